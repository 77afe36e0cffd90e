"""The quickstart's phases one by one: what each is given, what is skipped, what is measured."""

import json

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")

from mllm_align.align.pairwise import DPO
from mllm_align.align.sft import SFT
from mllm_align.errors import InputError
from mllm_align.evaluation.run import Evaluation
from mllm_align.testbed.hallucination import Counts, count
from mllm_align.testbed.quickstart import phases
from mllm_align.testbed.quickstart.phases import PROMPT, Base, Clock, Pictures, Recipe, Seed
from mllm_align.testbed.scenes.builder import make_example
from mllm_align.testbed.scenes.language import caption
from mllm_align.testbed.scenes.world import LESSONS, Settings

RECIPE = Recipe(Settings(), batch=4, seeing=(1, 3, 2, 4), sft=6, dpo=2, pairs=3, mask_rate=0.9)
PICTURES = 5


def read(split):
    return [make_example(split, index, RECIPE.scenes) for index in range(PICTURES)]


def true(example):
    """A caption in which nothing is made up."""
    return caption(example.scene, np.random.default_rng(0))


@pytest.fixture
def seed(tmp_path):
    return Seed(tmp_path / "seed-7", 7, RECIPE, read, Clock(tmp_path / "seconds.json"))


@pytest.fixture
def base(tmp_path):
    return Base(tmp_path / "base", 0, RECIPE, read, Clock(tmp_path / "seconds.json"))


@pytest.fixture
def trained(monkeypatch):
    """What is trained, in order: (config, start, data, run folder); each export is an empty folder."""
    calls = []
    monkeypatch.setattr(phases, "train", lambda *args: calls.append(args))
    monkeypatch.setattr(phases, "export_run", lambda run, out: out.mkdir(parents=True))
    return calls


# ---- the clock and the pictures ----------------------------------------------------------------------


def test_the_clock_adds_up_over_runs(tmp_path, monkeypatch):
    now = iter([0.0, 1.24, 10.0, 12.0, 20.0, 21.5])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    clock = Clock(tmp_path / "seconds.json")
    assert clock("SFT", lambda: "result") == "result"
    assert clock("DPO", lambda: None) is None
    Clock(tmp_path / "seconds.json")("SFT", lambda: None)
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"SFT": 2.7, "DPO": 2.0}


def test_a_phase_that_is_stopped_took_its_time(tmp_path, monkeypatch):
    now = iter([0.0, 3.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Clock(tmp_path / "seconds.json")("SFT", stopped)
    assert Clock(tmp_path / "seconds.json").seconds == {"SFT": 3.0}


@pytest.mark.parametrize("text", ['{"SFT": "long"}', '{"SFT": true}', "[]", "{"])
def test_a_file_of_something_else_is_no_clock(tmp_path, text):
    (tmp_path / "seconds.json").write_text(text)
    with pytest.raises(InputError, match="remove it, and it is made again"):
        Clock(tmp_path / "seconds.json")


def test_pictures_are_drawn_and_read_once(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(phases.builder, "prepare", lambda folder, settings: seen.append("drawn") or "data")
    monkeypatch.setattr(phases.builder, "read", lambda data, split: seen.append((data, split)) or "ab")
    pictures = Pictures(tmp_path, RECIPE.scenes)
    assert not seen
    assert pictures("train") == pictures("train") == ["a", "b"] and pictures("broken") == ["a", "b"]
    assert seen == ["drawn", ("data", "train"), ("data", "broken")]


# ---- pretraining -------------------------------------------------------------------------------------


def test_captions_come_without_their_picture_too(base):
    rows, blind = base._rows(), base._blind()
    count = sum(len(example.qas) for example in read("train"))
    assert rows[count:] == blind and all("images" in row for row in rows[:count])
    captions = [qa.answer for e in read("train") for qa in e.qas if qa.kind == "caption"]
    assert [row["completion"] for row in blind] == captions
    assert not any("images" in row for row in blind)
    assert len({row["id"] for row in rows}) == len(rows)


def test_pretraining_takes_the_lessons_in_order(base, trained, monkeypatch):
    made = {}
    monkeypatch.setattr(phases, "make_model", lambda folder, corpus, **sizes: made.update(corpus=[*corpus]))
    monkeypatch.setattr(Base, "_phase", lambda self, name, work: work())
    base.read = type("Read", (), {"drawn": None, "__call__": lambda self, split: read(split)})()
    base()
    assert [run.name for *_, run in trained] == ["words", "questions", "places", "pairs"]
    starts = [start for _, start, _, _ in trained]
    assert [*starts, base.model] == [base.out / "start", *(base.out / run.name for *_, run in trained)]
    assert [config.steps for config, *_ in trained] == [1, 3, 2, 4]
    for (config, _, rows, _), split in zip(trained, (LESSONS[0], *LESSONS), strict=True):
        assert config.objective == SFT() and config.lora is None and config.freeze == ()
        assert config.optim.schedule == "constant"
        kinds = {"caption"} if rows is trained[0][2] else {"caption", "presence"}
        known = [(e.png, qa.answer) for e in read(split) for qa in e.qas if qa.kind in kinds]
        assert [(row["images"][0]["bytes"], row["completion"]) for row in rows] == known
    assert all(text.startswith("USER: \n") for text in made["corpus"])

    trained.clear()
    base()
    assert not trained, "what is there is not made again"


# ---- SFT, BDHS, DPO and the control --------------------------------------------------------------------


def test_a_seed_goes_through_all_phases(seed, base, trained, monkeypatch):
    base.model.mkdir(parents=True)
    asked = []

    def bdhs(config, bundle, data, out):
        asked.append((config, bundle, data, out))
        return {"pairs": 3}

    monkeypatch.setattr(phases, "bdhs", bdhs)
    monkeypatch.setattr(phases, "load", lambda folder: folder.name)
    monkeypatch.setattr(Seed, "_measure", lambda self, bundle, split: f"{bundle} on {split}")
    found = seed(base)

    configs = {run.name: (config, start) for config, start, _, run in trained}
    assert list(configs) == ["sft", "aligned", "control"]
    assert [start for _, start in configs.values()] == [base.model, seed.out / "sft", seed.out / "sft"]
    assert {name: config.steps for name, (config, _) in configs.items()} == {
        "sft": 6,
        "aligned": 2,
        "control": 2,
    }
    assert configs["aligned"][0].objective == DPO(beta=RECIPE.beta, sft_weight=RECIPE.sft_weight)
    assert configs["aligned"][0].freeze == ("vision_tower",)
    assert configs["control"][0].objective == SFT()
    assert all(config.seed == 7 and config.batch_size == 4 for config, _ in configs.values())
    assert trained[1][2] == seed.out / "data" / "pairs.jsonl"

    ((config, bundle, data, out),) = asked
    assert (config.mask_rate, config.seed, config.similarity) == (0.9, 7, "lexical")
    assert (bundle, out.name) == ("sft", "pairs.jsonl")
    rows = [json.loads(each) for each in data.read_text().splitlines()]
    assert [row["chosen"] for row in rows] == [e.qas[0].answer for e in read("train")[: RECIPE.pairs]]

    splits = ("broken", "unbiased", "held_out")
    folders = {"sft": "sft", "sft_control": "control", "aligned": "aligned"}
    assert found == {
        "models": {name: {s: f"{folder} on {s}" for s in splits} for name, folder in folders.items()},
        "pairs": {"pairs": 3},
    }
    assert json.loads((seed.out / "measured.json").read_text()) == found
    trained.clear()
    assert seed(base) == found and not trained and len(asked) == 1


def test_the_control_goes_on_with_records_drawn_by_lot(seed):
    rows, found = seed._rows(), seed._further()
    assert len(found) == RECIPE.dpo * RECIPE.batch == len({row["id"] for row in found})
    assert all(row in rows for row in found) and found != rows[: len(found)]
    assert found == seed._further()
    other = Seed(seed.out, 8, RECIPE, read, seed.clock)
    assert other._further() != found


# ---- evaluation ----------------------------------------------------------------------------------------


@pytest.fixture
def answered(monkeypatch):
    """Captions are true; every question is answered with yes. What was asked, in order."""
    asked = []
    truth = {e.png: true(e) for split in ("broken", "unbiased", "held_out") for e in read(split)}

    def evaluate(bundle, items, evaluator, batch_size):
        asked.append(([item.record for item in items], evaluator.sampling))
        lines = []
        for item in items:
            caption = item.record.messages[-1].text == PROMPT
            answer = truth[item.record.images[0].read()] if caption else "Yes."
            lines.append({"response": answer, **evaluator.score(item, answer).details})
        return Evaluation({}, lines)

    monkeypatch.setattr(phases, "evaluate", evaluate)
    return asked


def test_captions_are_counted_each_by_its_own_picture(seed, answered):
    found = seed._measure(None, "held_out")
    assert list(found) == ["captions", "counts"]
    examples = read("held_out")
    assert found["captions"] == [true(e) for e in examples]
    for example, counts in zip(examples, found["counts"], strict=True):
        assert Counts(**counts) == count(example.scene, true(example))
        assert counts["hallucinated"] == 0 and counts["recalled"] == counts["present"] > 0
    ((records, sampling),) = answered
    assert sampling.temperature == 0
    assert [record.images[0].read() for record in records] == [e.png for e in examples]


@pytest.mark.parametrize("split", ["broken", "unbiased"])
def test_questions_are_asked_too(split, seed, answered):
    """Half of the answers are yes, so half are right."""
    found = seed._measure(None, split)["pope"]
    asked = answered[1][0]
    assert len(found) == len(asked) and {mode for mode, _ in found} <= {"random", "popular", "adversarial"}
    assert sum(right for _, right in found) * 2 == len(found) > 0
    assert all(record.messages[-1].text.endswith("?") for record in asked)
    again = Seed(seed.out, 7, RECIPE, read, seed.clock)._measure(None, split)["pope"]
    assert again == found
