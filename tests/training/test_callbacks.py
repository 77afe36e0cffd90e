"""What callbacks are told, and when."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import PAIRS, TINY, EachStep, bundle, compiling, events

from mllm_align import Callback, train
from mllm_align.errors import InputError, NotFinite
from mllm_align.training.checkpoint import choose

assert compiling  # a fixture


class Told(Callback):
    def __init__(self):
        self.steps, self.evals, self.saves = [], [], []

    def on_step(self, metrics):
        self.steps.append(metrics)

    def on_eval(self, step, metrics):
        self.evals.append((step, metrics))

    def on_save(self, step, path):
        self.saves.append((step, path, choose(path.parent, step)))


def test_callbacks_are_told_of_steps_evaluations_and_whole_checkpoints(tmp_path):
    told, seen, out = Told(), [], tmp_path / "run"
    config = replace(TINY, eval_every=2, save_every=1, keep=9)
    train(config, bundle(), PAIRS, out, PAIRS, callbacks=[told, EachStep(seen.append), Callback()])
    lines = {
        kind: [{k: v for k, v in line.items() if k not in ("event", "time")} for line in events(out, kind)]
        for kind in ("train", "eval")
    }
    assert told.steps == seen == lines["train"] and len(seen) == 4
    assert [{"step": step, **metrics} for step, metrics in told.evals] == lines["eval"]
    assert [step for step, _ in told.evals] == [2, 4]
    places = [(step, str(path)) for step, path, _ in told.saves]
    assert places == [(step, str(out / "checkpoints" / str(step))) for step in (1, 2, 3, 4)]
    assert [found for *_, found in told.saves] == [(step, []) for step in (1, 2, 3, 4)], "whole when told"


def test_what_is_no_callback_is_refused_before_anything_is_written(tmp_path):
    for wrong, name in ((print, "print"), (object(), "object")):
        with pytest.raises(InputError, match=f"callbacks has {name}, .*; make it a subclass"):
            train(TINY, bundle(), PAIRS, tmp_path / "run", callbacks=[Callback(), wrong])
    assert not (tmp_path / "run").exists()


class Asked(Callback):
    """Figures by step; checks that the policy is the one of the step."""

    policy_every = 2

    def __init__(self, values, lower=()):
        self.values, self.lower, self.begun, self.policies = values, lower, [], []

    def on_start(self, bundle):
        self.begun.append(bundle)

    def on_policy(self, step, policy):
        self.policies.append((step, str(jax.tree.map(lambda x: np.asarray(x).sum(), policy.trained))))
        return {"mine/figure": self.values[len(self.policies) - 1], "mine/other": 1}

    def higher_is_better(self, figure):
        return figure not in self.lower


@pytest.mark.parametrize("lower, wanted", [((), 2), (("mine/figure",), 4)])
def test_figures_of_the_policy_are_logged_and_tell_the_best_checkpoint(tmp_path, capfd, lower, wanted):
    asked, out = Asked([0.25, 0.75, 0.5], lower), tmp_path / "run"
    config = replace(TINY, best="mine/figure", keep=1, save_every=100)
    trained = train(config, bundle(), PAIRS, out, callbacks=[asked, Callback()])
    lines = [(line["step"], line["mine/figure"], line["mine/other"]) for line in events(out, "benchmark")]
    assert lines == [(0, 0.25, 1.0), (2, 0.75, 1.0), (4, 0.5, 1.0)]
    policies = [each for _, each in asked.policies]
    assert len(asked.begun) == 1 and len(set(policies)) == 3
    assert policies[-1] == str(jax.tree.map(lambda x: np.asarray(x).sum(), trained.trained))
    assert choose(out / "checkpoints", "best")[0] == wanted
    said = capfd.readouterr().out
    assert "benchmark 2  mine/figure 0.75  mine/other 1" in said
    value = {2: "0.75", 4: "0.5"}[wanted]
    assert f"the best mine/figure, {value}, is that of step {wanted}" in said


def test_the_best_figure_must_be_one_that_is_given(tmp_path):
    config = replace(TINY, best="mine/absent")
    with pytest.raises(InputError, match=r"^best is mine/absent, and no benchmark is asked"):
        train(config, bundle(), PAIRS, tmp_path / "run", callbacks=[Callback()])
    with pytest.raises(InputError, match=r"^best is mine/absent; it must be one of mine/figure"):
        train(config, bundle(), PAIRS, tmp_path / "run", callbacks=[Asked([0.5])])
    assert not (tmp_path / "run").exists()


class Broken(Callback):
    def on_policy(self, step, policy):
        raise NotFinite("logits are not finite")


def test_figures_that_are_not_finite_stop_the_run_or_are_left_out(tmp_path, capfd):
    with pytest.raises(NotFinite):
        train(TINY, bundle(), PAIRS, tmp_path / "run", callbacks=[Broken()])
    train(replace(TINY, nonfinite="skip"), bundle(), PAIRS, tmp_path / "run", callbacks=[Broken()])
    assert "benchmarks at step 4: logits are not finite; they are left out" in capfd.readouterr().err
    assert not events(tmp_path / "run", "benchmark")
