"""Annotators for Scenes: exact counts, and the base's answers about what a response mentions."""

from dataclasses import replace

import numpy as np
import pytest
from judges import answering, base, record
from runs import compiling

pytest.importorskip("tensorflow_datasets")

from mllm_align.annotate.factory import Context
from mllm_align.annotate.verdict import Question, rank
from mllm_align.errors import InputError
from mllm_align.testbed.annotators import Oracle, SceneOracle, SceneQuestions
from mllm_align.testbed.hallucination import count
from mllm_align.testbed.scenes import builder
from mllm_align.testbed.scenes.language import caption
from mllm_align.testbed.scenes.world import KINDS, Settings, make_scene

assert compiling and base and answering  # fixtures
SETTINGS = Settings(train=3, held_out=2, unbiased=0, broken=0, lessons=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    builder.prepare(folder, SETTINGS)
    return folder


@pytest.fixture
def oracle(folder):
    return Oracle(folder)


def asked(name, *responses):
    return Question(record(name, prompt="What is there?"), responses)


# ---- the oracle --------------------------------------------------------------------------------------


def test_fewer_errors_win_and_recall_decides_between_equals(oracle):
    assert SceneOracle.on_devices is False
    scene = make_scene("train", 1, SETTINGS)
    there, absent = scene.things[0], next(kind for kind in KINDS if kind not in scene.kinds)
    whole = caption(scene, np.random.default_rng(0))
    best = [whole, f"There is a {there.kind}.", "", f"There is a {absent}.", f"{whole} We see a {absent}."]
    (verdict,) = oracle([asked("train-000001-0", *best)])
    assert verdict.ranking[:3] == (0, 1, 2) and verdict.ranking[3:] == (4, 3)
    present = len(set(scene.kinds))
    assert verdict.scores == pytest.approx(
        [present / (present + 1), 1 / (present + 1), 0, -1, -1 + present / (present + 1)]
    )
    assert verdict.reason.startswith(f"Response 1: no error, {present} of {present} things named; Resp")
    assert f"Response 4: 1 not there, 0 of {present} things named" in verdict.reason


def test_f1_counts_what_is_missing_too(folder):
    scene = make_scene("train", 1, SETTINGS)
    absent = next(kind for kind in KINDS if kind not in scene.kinds)
    whole = caption(scene, np.random.default_rng(0))
    one = f"There is a {scene.things[0].kind}."
    said = (whole, f"{whole} We see a {absent}.", one, f"{one} {one}", "", f"{whole} And so on.")
    (verdict,) = Oracle(folder, order="f1")([asked("train-000001-0", *said)])
    there = len(set(scene.kinds))
    more = 2 * there / (2 * there + 1)
    assert verdict.scores == pytest.approx(
        [1, more, *[2 / (2 + there - 1)] * 2, 0, 2 * there / (2 * there + 2)]
    ), "repetition wins nothing, and babble loses"


def test_every_kind_of_error_counts_once(oracle):
    scene = make_scene("held_out", 0, SETTINGS)
    thing = scene.things[0]
    colour = "black" if thing.colour != "black" else "red"
    wrong = f"There is a {colour} {thing.kind}."
    assert count(scene, wrong).attributes_wrong == 1
    babble = "Lorem ipsum dolor."
    (verdict,) = rank(oracle, [asked("held_out-000000-2", wrong, babble)])
    present = len(set(scene.kinds))
    assert verdict.scores == pytest.approx((-1 + 1 / (present + 1), -1))
    assert "Response 1: 1 of wrong colour or size, 1 of" in verdict.reason
    (equal,) = rank(oracle, [asked("held_out-000000-2", wrong, f"{wrong} {wrong[:-1]}!")])
    assert equal.pair == (0, 1)  # what is said twice is wrong twice
    (tie,) = rank(oracle, [asked("held_out-000000-2", babble, "Dolor sit amet.")])
    assert tie.outcome == "tie" and tie.pair is None and "1 not there" in tie.reason


def test_what_a_record_of_a_scene_is_called(oracle, folder):
    names = {row["id"] for split in ("train", "held_out") for row in builder.sft_rows(_read(folder, split))}
    names |= {f"{name}-blind" for name in names} | {"everywhere-000000"}
    for name in names:
        assert name.startswith(f"{oracle.scene(record(name)).id}")
    assert len(names) == 2 * 3 * 5 + 1


def _read(folder, split):
    return list(builder.read(folder, split))


def test_scenes_are_read_when_they_are_asked_for_and_once(folder, monkeypatch):
    read = []
    real = builder.read
    monkeypatch.setattr(builder, "read", lambda *args: (read.append(args), real(*args))[1])
    oracle = Oracle(folder)
    assert not read
    for name in ("train-000000-0", "train-000002-1", "train-000000-0-blind"):
        oracle.scene(record(name))
    assert read == [(folder, "train")]
    assert oracle.scene(record("train-000000-1")) is oracle.scene(record("train-000000-0"))


@pytest.mark.parametrize(
    "name, said",
    [
        ("lesson-7", "is not named after a scene"),
        ("train-000001-0-blinded", "is not named after a scene"),
        ("train-000003-0", "has no scene there"),
        ("train-01-0", "has no scene there"),
        ("broken-000000-0", "'broken' has no pictures"),
    ],
)
def test_a_record_without_a_scene_is_named(oracle, folder, name, said):
    with pytest.raises(InputError) as error:
        rank(oracle, [asked(name, "There is a cup.", "There is a hat.")])
    line = str(error.value)
    assert line.startswith("rows 0, id") and f"'{name}'" in line and said in line and folder.name in line
    assert "annotator.scenes" in line and "\n" not in line


def test_records_that_are_known_are_looked_up_at_once(folder):
    assert Oracle(folder, [record("train-000001-0")])
    with pytest.raises(InputError, match="id 'train-000003-0'"):
        Oracle(folder, [record("train-000001-0"), record("train-000003-0")])


def test_a_folder_without_scenes_is_named(tmp_path):
    with pytest.raises(InputError, match=r"id 'train-000000-0'.* holds no pictures"):
        Oracle(tmp_path).scene(record("train-000000-0"))


# ---- the base's own answers --------------------------------------------------------------------------

SMALL = SceneQuestions(batch_size=2)


def sees(*kinds):
    """A base that sees these kinds."""
    return lambda each: "Yes, there is" if any(f" {k} " in each.messages[0].text for k in kinds) else "No"


def test_mentions_that_the_base_denies_count(base, answering):
    calls = answering(sees("cup", "moon"))
    annotator = SMALL.open(Context(base))
    assert SMALL.on_devices
    responses = (
        "There is a red cup. We see a moon.",
        "There is a cup above an arrow. On the left is a hat. We see a hat.",
        "Lorem ipsum. Dolor! There is a cup.",
        "A lovely moon indeed",
    )
    (verdict,) = rank(annotator, [asked("r0", *responses)])
    assert verdict.scores == (0, -3, -2, 0)
    assert verdict.reason == "arrow: No, cup: Yes, there is, hat: No, moon: Yes, there is"
    (call,) = calls
    texts = [each.record.messages[0].text for each in call["records"]]
    wanted = [f"Is there {a} in the picture?" for a in ("an arrow", "a cup", "a hat", "a moon")]
    assert texts == wanted
    assert {each.record.id for each in call["records"]} == {"r0"}, "what an error names"
    assert all(len(each.record.images) == 1 for each in call["records"])
    assert (call["sampling"].temperature, call["decoder"].size, call["what"]) == (0, 2, None)


def test_each_record_has_its_own_answers(base, answering):
    calls = answering(lambda each: "yes" if each.id.startswith("r1") else "no")
    two = [asked("r0", "There is a cup.", "There is nothing."), asked("r1", "There is a cup.", "Lorem.")]
    first, second = rank(SMALL.open(Context(base)), two)
    assert first.scores == (-1, 0) and second.scores == (0, -1)
    assert len(calls[0]["records"]) == 2


@pytest.mark.parametrize("answer, outcome", [("Perhaps", "unparsable"), ("", "unparsable"), ("no", "tie")])
def test_answers_that_decide_nothing(base, answering, answer, outcome):
    answering(lambda _: answer)
    (verdict,) = rank(SMALL.open(Context(base)), [asked("r0", "There is a cup.", "There is a hat.")])
    assert verdict.outcome == outcome and verdict.pair is None and verdict.reason


def test_nothing_is_asked_where_nothing_is_mentioned(base, answering):
    calls = answering(sees())
    (verdict,) = rank(SMALL.open(Context(base)), [asked("r0", "Lorem ipsum.", "There is nothing.")])
    assert verdict.scores == (-1, 0) and not calls


def test_a_question_over_the_limit_fails(base, answering):
    answering(sees("cup"))
    longest = replace(base.config.decoder, max_length=20)
    short = replace(base, folder=replace(base.folder, config=replace(base.config, decoder=longest)))
    (verdict,) = rank(SMALL.open(Context(short)), [asked("r0", "There is a cup.", "There is a hat.")])
    assert verdict.outcome == "failed"


def test_a_model_with_random_weights_says_neither(base):
    (verdict,) = rank(SMALL.open(Context(base)), [asked("r0", "There is a cup.", "There is a hat.")])
    assert verdict.outcome == "unparsable" and "cup: " in verdict.reason
