"""What callbacks are told, and when."""

from dataclasses import replace

import pytest
from runs import PAIRS, TINY, EachStep, bundle, compiling, events

from mllm_align import Callback, train
from mllm_align.errors import InputError
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
