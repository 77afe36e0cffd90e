"""A run that is continued for longer, or shorter, than it was started for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from runs import PAIRS, TINY, bundle, compiling, events, losses, same

from mllm_align import InputError, OptimConfig, train
from mllm_align.training.run_folder import Length, goes_on, length, lengths, read_config, start

assert compiling  # a fixture
COSINE = replace(TINY, steps=2, optim=OptimConfig(learning_rate=1e-2, schedule="cosine", warmup=0.0))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Two steps at a constant rate."""
    out = tmp_path_factory.mktemp("short") / "run"
    train(replace(TINY, steps=2), bundle(), PAIRS, out)
    return out


@pytest.fixture
def copy(short, tmp_path):
    return Path(shutil.copytree(short, tmp_path / "run"))


@pytest.mark.slow
def test_longer_is_as_if_started_so(copy, tmp_path):
    config = replace(TINY, steps=4)
    whole = train(config, bundle(), PAIRS, tmp_path / "whole")
    again = train(config, bundle(), PAIRS, copy)
    assert same(again.trained, whole.trained) and losses(copy) == losses(tmp_path / "whole")
    (event,) = events(copy, "continued")
    assert (event["step"], event["steps_before"], event["steps"]) == (2, 2, 4)
    assert read_config(copy) == config
    facts = json.loads((copy / "run.json").read_text())
    assert (facts["steps"], facts["warmup_steps"]) == (4, 0)
    train(config, bundle(), PAIRS, copy)
    assert len(events(copy, "continued")) == 1 and events(copy)[-1]["event"] == "done"


def test_epochs_may_be_raised_and_what_is_done_stays(copy):
    train(replace(TINY, steps=None, epochs=1.5), bundle(), PAIRS, copy)  # two batches in each
    assert events(copy, "done")[-1]["step"] == 3
    assert (read_config(copy).steps, read_config(copy).epochs) == (None, 1.5)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="has taken 3 steps, 1 are asked for; give --steps 3 or more"):
        train(replace(TINY, steps=1), bundle(), PAIRS, copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_warm_up_stays_where_it_was(tmp_path):
    optim = OptimConfig(learning_rate=1e-2, schedule="constant", warmup=0.5)
    train(replace(TINY, steps=2, optim=optim), bundle(), PAIRS, tmp_path / "run")
    train(replace(TINY, steps=6, optim=optim), bundle(), PAIRS, tmp_path / "run")
    rates = [line["learning_rate"] for line in events(tmp_path / "run", "train")]
    assert rates == pytest.approx([1e-2] * 6), "one step, not three"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["warmup_steps"] == 1


@pytest.mark.parametrize(
    "schedule, done, steps, rates",
    [
        ("linear", 2, 8, "0.00857, not 0.00667"),
        ("cosine", 4, 8, "0.00611, not 0"),
        ("constant", 2, 8, None),
    ],
)
def test_what_would_change(tmp_path, schedule, done, steps, rates):
    optim = OptimConfig(learning_rate=1e-2, schedule=schedule, warmup=0.25)
    config = replace(TINY, steps=4, optim=optim)
    start(tmp_path, config, {"model": "m", "model_fingerprint": "f"} | lengths(length(config, 8)), 0)
    longer = replace(config, steps=steps)
    if rates is not None:
        with pytest.raises(InputError, match=rates):
            goes_on(tmp_path, {}, longer, 8, done, False)
    before, now = goes_on(tmp_path, {}, longer, 8, done, rates is not None)
    assert (before, now) == (Length(4, 1), Length(8, 1)), "not 2 of warm-up"


@pytest.mark.slow
def test_a_schedule_changes_only_if_that_is_allowed(tmp_path):
    out = tmp_path / "run"
    train(COSINE, bundle(), PAIRS, out)
    longer = replace(COSINE, steps=4)
    said = r"started for 2 steps; with 4 its cosine schedule changes: the learning rate of step 3 would be "
    with pytest.raises(InputError, match=said + r"0\.005, not 0; give --allow-schedule-change"):
        train(longer, bundle(), PAIRS, out)
    assert read_config(out).steps == 2
    train(longer, bundle(), PAIRS, out, allow_schedule_change=True)
    rates = [line["learning_rate"] for line in events(out, "train")]
    assert rates[2:] == pytest.approx([0.005, 0.01 * (1 - 2**-0.5) / 2], abs=1e-6)
    train(longer, bundle(), PAIRS, out)  # settled: nothing more is asked


def test_facts_that_can_not_be_are_refused(copy):
    facts = json.loads((copy / "run.json").read_text())
    for steps, warmup in ((True, 0), ("2", 0), (2, 3), (10**12, 0), (2, -1), (2.0, 0)):
        (copy / "run.json").write_text(json.dumps(facts | {"steps": steps, "warmup_steps": warmup}))
        with pytest.raises(InputError, match="its steps and warmup_steps are"):
            train(replace(TINY, steps=4), bundle(), PAIRS, copy)
    kept = {name: value for name, value in facts.items() if "steps" not in name}  # of an earlier version
    (copy / "run.json").write_text(json.dumps(kept))
    train(replace(TINY, steps=3), bundle(), PAIRS, copy)
    assert events(copy, "continued")[0]["steps_before"] == 2
