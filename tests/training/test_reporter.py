"""What a run tells log, terminal and callbacks, and what it stops at."""

import types
from dataclasses import replace

import pytest
from runs import TINY

from mllm_align import RLOO, Callback, InputError, OnlineRewards
from mllm_align.errors import Diverged, NotFinite
from mllm_align.training.reporter import Reporter, due


class Told(Callback):
    """Figures every 3 steps."""

    policy_every = 3

    def __init__(self, figures=None):
        self.seen, self.figures = [], figures or {}

    def on_step(self, metrics):
        self.seen.append(("step", metrics["step"]))

    def on_eval(self, step, metrics):
        self.seen.append(("eval", step, metrics["loss"]))

    def on_save(self, step, path):
        self.seen.append(("save", step))

    def on_policy(self, step, policy):
        if isinstance(self.figures, Exception):
            raise self.figures
        return self.figures


def reporter(folder=None, config=TINY, callbacks=(), best=(None, float("inf"))):
    """With its log as a list of (event, fields)."""
    log = []
    checkpoints = types.SimpleNamespace(folder=folder, best=lambda: best)
    told = Reporter(config, lambda event, **fields: log.append((event, fields)), checkpoints, callbacks, 8)
    return told, log


def test_due():
    assert [step for step in range(7) if due(3, step)] == [0, 3, 6] and not due(None, 0)


def test_figures_of_a_step_and_their_limits(capsys):
    online = OnlineRewards(max_kl=2.0)
    config, seen = replace(TINY, objective=RLOO(), online=online), Told()
    told, log = reporter(config=config, callbacks=[seen])
    values = {"step": 3, "loss": 0.5, "learning_rate": 1e-3, "seconds_left": None}
    (name, (field, limit)) = next(iter(online.limits.items()))
    told.step(values | {name: limit})
    with pytest.raises(Diverged, match=rf"step 3: {name} is .*above online.{field}"):
        told.step(values | {name: limit + 1})
    assert [event for event, _ in log] == ["train", "train"] and seen.seen == [("step", 3)] * 2
    assert "seconds_left" not in log[0][1] and capsys.readouterr().out.count("loss 0.5") == 2


def test_held_out_figures(capsys):
    seen = Told()
    told, log = reporter(callbacks=[seen])
    told.evaluated(4, {"loss": 0.25, "rewards/accuracy": 0.75, "rewards/margin": 1.5})
    assert log == [("eval", {"step": 4, "loss": 0.25, "rewards/accuracy": 0.75, "rewards/margin": 1.5})]
    assert seen.seen == [("eval", 4, 0.25)]
    assert capsys.readouterr().out == "eval 4  loss 0.2500  margin 1.5000  acc 0.750\n"


def test_benchmarks_are_asked_when_due(capsys):
    config = replace(TINY, best="pope/f1")
    told, log = reporter(config=config, callbacks=[Callback(), Told({"pope/f1": 0.5, "pope/all/f1": 0.4})])
    assert [step for step in range(9) if told.asked(step)] == [0, 3, 6, 8]
    assert told.ask(3, None) == -0.5, "higher is better"
    assert log == [("benchmark", {"step": 3, "pope/f1": 0.5, "pope/all/f1": 0.4})]
    assert capsys.readouterr().out == "benchmark 3  pope/f1 0.5\n"
    with pytest.raises(InputError, match=r"best is pope/f1; it must be one of chair/i"):
        reporter(config=config, callbacks=[Told({"chair/i": 0.1})])[0].ask(0, None)


def test_benchmarks_that_are_not_finite(capsys):
    callbacks = [Told(NotFinite("logits are not finite"))]
    with pytest.raises(NotFinite):
        reporter(callbacks=callbacks)[0].ask(3, None)
    told, log = reporter(config=replace(TINY, nonfinite="skip"), callbacks=callbacks)
    assert told.ask(3, None) is None and not log
    assert "benchmarks at step 3: logits are not finite; they are left out" in capsys.readouterr().err


def test_callbacks_hear_of_whole_checkpoints_once(tmp_path):
    seen = Told()
    told, log = reporter(tmp_path, callbacks=[seen])
    told.saving(1)
    (tmp_path / "1").mkdir()
    told.saving(2)
    assert seen.seen == [("save", 1)]
    told.saved()
    told.saved()
    assert seen.seen == [("save", 1)], "the save of step 2 failed"
    assert [fields["step"] for _, fields in log] == [1, 2]


@pytest.mark.parametrize(
    "name, best, said",
    [
        ("loss", (3, 0.25), (3, "the least held-out loss, 0.2500,")),
        ("pope/f1", (5, -0.875), (5, "the best pope/f1, 0.875,")),
        ("loss", (None, float("inf")), None),
    ],
)
def test_the_best_checkpoint(name, best, said):
    assert reporter(config=replace(TINY, best=name), best=best)[0].best() == said


def test_records_that_are_not_finite(capsys):
    told, log = reporter()
    with pytest.raises(NotFinite, match="step 2: loss or gradient is not finite, with records a, b"):
        told.nonfinite(2, "step 2: loss or gradient is", ["a", "b"], "train")
    assert log == [("nonfinite", {"step": 2, "records": ["a", "b"], "policy": "stop", "during": "train"})]
    reporter(config=replace(TINY, nonfinite="skip"))[0].nonfinite(2, "figures are", ["a"], "evaluation")
    assert capsys.readouterr().err == "figures are not finite, with records a; the batch is left out\n"
