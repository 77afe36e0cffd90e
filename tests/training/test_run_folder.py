"""Run folders: what may stand in one, what continues, how long a run is, what it says of itself."""

import json
from dataclasses import replace

import pytest
from etils import epath
from refusals import refusal

from mllm_align import Endpoint
from mllm_align.config import Config, DataConfig, MeshConfig, OnlinePairs, OptimConfig, save_json
from mllm_align.training.run_folder import (
    Length,
    check,
    check_folder,
    checkpoints_folder,
    goes_on,
    has_begun,
    length,
    read_metadata,
    undone_unless_begun,
)

CONFIG = Config(batch_size=4)
FACTS = {"model": "m", "model_fingerprint": "1", "projector_fingerprint": "2", "data_fingerprint": "3"}


def write_run(out, config=CONFIG, facts=FACTS, events=()):
    out.mkdir(exist_ok=True, parents=True)
    (out / "config.json").write_text(save_json(config))
    (out / "run.json").write_text(json.dumps(facts))
    (out / "log.jsonl").write_text("".join(json.dumps({"event": each}) + "\n" for each in events))
    return out


# ---- what may stand in a folder --------------------------------------------------------------------


def test_a_new_folder_and_what_a_failed_start_left_are_fine(tmp_path):
    check_folder(tmp_path / "new", CONFIG)
    check_folder(tmp_path, CONFIG)
    (tmp_path / "reference.npz").touch()
    (tmp_path / "answers").mkdir()
    check_folder(tmp_path, CONFIG)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    assert "holds other files" in refusal(check_folder, tmp_path, CONFIG)
    assert "is a file; --out names a folder" in refusal(check_folder, tmp_path / "photo.jpg", CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 7},
        {"epochs": 3.0},
        {"micro_batches": 2},
        {"remat": "none"},
        {"mesh": MeshConfig(fsdp=2)},
        {"log_every": 1},
        {"save_every": 1},
        {"nonfinite": "skip"},
        {"data": DataConfig(threads=1, prefetch=1)},
    ],
    ids=str,
)
def test_what_moves_no_number_may_change(tmp_path, change):
    check_folder(write_run(tmp_path / "run", events=["train"]), replace(CONFIG, **change))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 8}, "batch_size"),
        ({"optim": OptimConfig(learning_rate=1.0)}, "optim.learning_rate"),
        ({"data": DataConfig(shuffle=False)}, "data.shuffle"),
        ({"lora": None}, "lora"),
    ],
)
def test_what_moves_one_may_not_once_a_step_is_taken(tmp_path, change, named):
    begun = write_run(tmp_path / "run", events=["start", "train"])
    said = refusal(check_folder, begun, replace(CONFIG, **change))
    assert "was started with another configuration" in said and named in said
    (begun / "log.jsonl").write_text('{"event": "start"}\n')
    check_folder(begun, replace(CONFIG, **change))


def test_how_an_endpoint_is_reached_may_change_and_what_it_is_may_not(tmp_path):
    def config(**fields):
        return replace(CONFIG, online=OnlinePairs(annotator=Endpoint(model="a", **fields)))

    run = write_run(tmp_path / "run", config(), events=["train"])
    check_folder(run, config(url="http://elsewhere/v1", concurrency=2, retries=1))
    other = replace(CONFIG, online=OnlinePairs(annotator=Endpoint(model="b")))
    assert "online.annotator.model" in refusal(check_folder, run, other)


# ---- has it begun ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "log, begun",
    [
        (None, False),
        ("", False),
        ('{"event": "start"}\n', False),
        ("half a li", False),
        ('[1]\n{"event": "start"}\n', False),
        ('{"event": "start"}\n{"event": "train", "step": 1}\n', True),
        ('{"event": "start"}\nhalf a li\n{"event": "save"}\n', True),
    ],
)
def test_a_run_has_begun_where_its_log_tells_of_more_than_the_start(tmp_path, log, begun):
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    assert has_begun(tmp_path, epath.Path(tmp_path / "checkpoints")) is begun


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Stop(Exception):
    pass


def failing_start(out, *events):
    """A start that writes into the folder and fails after these events."""
    place = epath.Path(out / "checkpoints")
    with pytest.raises(Stop), undone_unless_begun(out, place):
        write_run(out, events=events)
        (out / "reference.npz").touch()
        place.mkdir(exist_ok=True)
        raise Stop


def test_a_start_that_fails_leaves_only_what_was_dear(tmp_path):
    out = tmp_path / "run"
    failing_start(out, "start")
    assert contents(out) == ["reference.npz"]


def test_a_run_that_has_begun_stays_whole(tmp_path):
    out = tmp_path / "run"
    failing_start(out, "start", "train")
    assert contents(out) == ["checkpoints", "config.json", "log.jsonl", "reference.npz", "run.json"]


def test_what_was_there_before_stays(tmp_path):
    (tmp_path / "notes.txt").touch()
    failing_start(tmp_path)
    assert contents(tmp_path) == ["notes.txt", "reference.npz"]


# ---- the same model and data -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, said",
    [
        ("model", "was started from another model (m, fingerprint 1; this one is 9)"),
        ("projector", "was started from another projector"),
        ("data", "was started on other data"),
        ("judge", "was started with another judge (judge, fingerprint None; this one is 9)"),
    ],
)
def test_a_run_goes_on_from_its_own_model_and_data(tmp_path, name, said):
    out = write_run(tmp_path / "run", events=["train"])
    check(out, CONFIG, FACTS)
    other = FACTS | {f"{name}_fingerprint": "9"}
    assert said in refusal(check, out, CONFIG, other)
    (out / "log.jsonl").unlink()
    check(out, CONFIG, other)


def test_a_run_goes_on_with_its_own_weights(tmp_path):
    out, given = write_run(tmp_path / "run", events=["train"]), {"data_weights": {"a": 2.0, "b": 1.0}}
    said = refusal(check, out, CONFIG, FACTS | given)
    assert "was started with one data set and no weights; give --data so" in said
    mixed = tmp_path / "mixed"
    write_run(mixed, events=["train"])
    (mixed / "run.json").write_text(json.dumps(FACTS | given))
    check(mixed, CONFIG, FACTS | given)
    for other in ({"a": 1.0, "b": 1.0}, None):
        said = refusal(check, mixed, CONFIG, FACTS | {"data_weights": other})
        assert "was started with the weights a 2, b 1; give --data so" in said


@pytest.mark.parametrize("text, said", [("{", "is not JSON"), ("{}", "model is None"), ("[]", "list")])
def test_a_run_that_says_too_little_is_refused(tmp_path, text, said):
    (tmp_path / "run.json").write_text(text)
    assert said in refusal(read_metadata, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(FACTS | {"model_step": 0}))
    assert "model_step is 0" in refusal(read_metadata, tmp_path)


# ---- how long --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, records, found",
    [
        (Config(batch_size=4, epochs=1), 8, (2, 0)),
        (Config(batch_size=4, epochs=1), 9, (3, 0)),
        (Config(batch_size=4, epochs=0.5), 9, (2, 0)),
        (Config(batch_size=4, epochs=3, steps=7), 9, (7, 0)),
        (Config(batch_size=1, epochs=1), 200, (200, 6)),
        (Config(batch_size=1, steps=50, optim=OptimConfig(warmup=0.5)), 8, (50, 25)),
    ],
)
def test_steps_and_warm_up(config, records, found):
    """An epoch's last batch need not be full."""
    assert length(config, records) == found


def test_more_steps_than_can_be_counted():
    said = refusal(length, Config(batch_size=1, epochs=10**9), 100)
    assert "makes 100000000000 steps of 100 in each epoch; give fewer" in said


def test_how_long_a_run_was_to_be_is_what_it_says_of_itself(tmp_path):
    config = replace(CONFIG, steps=10, optim=OptimConfig(schedule="constant", warmup=0.5))
    out = write_run(tmp_path / "run", config, FACTS | {"steps": 10, "warmup_steps": 5})
    assert goes_on(out, {}, config, 8, 3, False) == (Length(10, 5), Length(10, 5))
    longer = replace(config, steps=20)
    assert goes_on(out, {}, longer, 8, 3, False) == (Length(10, 5), Length(20, 5))
    said = refusal(goes_on, out, {}, longer, 8, 21, False)
    assert "has taken 21 steps, 20 are asked for; give --steps 21 or more" in said


def test_of_an_earlier_version_the_config_says_it(tmp_path):
    config = replace(CONFIG, epochs=2.0)
    out = write_run(tmp_path / "run", config)
    assert goes_on(out, {}, config, 8, 1, False) == (Length(4, 0), Length(4, 0))


def test_a_schedule_that_changes_needs_leave(tmp_path):
    """Cosine to 0 over 10 steps, of which 5 are taken: half of the rate; over 20 it is 85% of it."""
    optim = OptimConfig(learning_rate=1.0, schedule="cosine", warmup=0.0)
    config = replace(CONFIG, steps=10, optim=optim)
    out = write_run(tmp_path / "run", config, FACTS | {"steps": 10, "warmup_steps": 0})
    longer = replace(config, steps=20)
    said = refusal(goes_on, out, {}, longer, 8, 5, False)
    assert (
        "the learning rate of step 6 would be 0.854, not 0.5" in said and "--allow-schedule-change" in said
    )
    assert goes_on(out, {}, longer, 8, 5, True)[1] == Length(20, 0)


# ---- places ----------------------------------------------------------------------------------------


def test_where_checkpoints_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    assert checkpoints_folder(out, CONFIG) == epath.Path(out / "checkpoints")
    assert checkpoints_folder(out, replace(CONFIG, checkpoints="kept")) == epath.Path(tmp_path / "kept")
    bucket = checkpoints_folder(out, replace(CONFIG, checkpoints="gs://bucket/run"))
    assert str(bucket) == "gs://bucket/run"
