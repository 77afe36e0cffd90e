"""Figures between two log lines: sums over weights, shares of real tokens, steps that were not taken."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.batch import Shape
from mllm_align.config import Config
from mllm_align.data.encode import Encoded
from mllm_align.training import window
from mllm_align.training.online.maker import TrainBatch
from mllm_align.training.step import Health
from mllm_align.training.window import Window, culprits

SHAPE = Shape(10, 4, 1)


def record(prefix, *responses):
    ids = tuple(np.zeros(n, np.int32) for n in responses)
    return Encoded(None, np.zeros(prefix, np.int32), ids, (), Shape(prefix, max(responses), 1))


def batch(step, *records, metrics=None):
    return TrainBatch(None, step, tuple(range(len(records))), SHAPE, records, metrics or {})


def health(finite=True, rows=(False, False)):
    return Health(jnp.asarray(finite), jnp.asarray([rows]))


def metric(total, weight):
    return jnp.float32(total), jnp.float32(weight)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(window.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(window, "peak_flops", lambda: 400.0)
    return now


def test_figures(clock):
    told = []
    made = Window(
        Config(batch_size=2), lambda records: 100.0 * len(records), lambda *each: told.append(each)
    )
    both = record(7, 3, 2), record(10, 4, 4)
    figures = {"rollout/seconds": (1.5, 1.0)}
    made.add(batch(4, *both, metrics=figures), {"loss": metric(3, 2)}, health(), 0.25)
    one = batch(5, both[0], None, metrics=figures)
    made.add(one, {"loss": metric(1, 2)}, health(), 0.25)
    made.updated(0.5)
    clock.seconds += 2.0
    values = made.close(6, 10, 0.125)
    assert not told
    assert values == {
        "step": 6,
        "loss": 1.0,
        "rollout/seconds": 1.5,
        "update/seconds": 0.5,
        "learning_rate": 0.125,
        "pairs_per_second": 1.5,
        "tokens_per_second": 21.0,  # 12 + 18 + 12 real tokens
        "padding": 1 - 42 / 72,  # two batches of two rows of 10 + 2 x 4
        "flops_per_second": 150.0,
        "mfu": 150.0 / 400.0,
        "data_wait": 0.25,
        "seconds_per_step": 1.0,
        "seconds_left": 4.0,
    }


def test_shares_of_the_sets_that_are_mixed(clock):
    made = Window(Config(batch_size=2), lambda records: 0.0, lambda *each: None, ["a", "b", "c"])
    both = record(7, 3, 2), record(10, 4, 4)
    made.add(batch(0, *both), {"loss": metric(3, 2)}, health(), 0.0)
    made.add(replace(batch(1, *both), indices=(1, 1)), {"loss": metric(3, 2)}, health(), 0.0)
    clock.seconds += 1.0
    values = made.close(2, 2, 0.0)
    assert [values[f"source/{name}/share"] for name in "abc"] == [0.25, 0.75, 0.0]


def test_steps_that_compile_have_no_speed(clock):
    made = Window(Config(batch_size=2), lambda records: 100.0, lambda *each: None)
    both = record(7, 3, 2), record(10, 4, 4)
    clock.seconds += 30.0
    made.add(batch(0, *both), {"loss": metric(3, 2)}, health(), 9.0, untimed=30.0)
    made.updated(None)
    clock.seconds += 2.0
    made.add(batch(1, *both), {"loss": metric(1, 2)}, health(), 1.0)
    clock.seconds += 5.0
    made.leave_out(5.0)  # saving
    values = made.close(2, 10, 0.0)
    assert values["loss"] == 1.0, "of both steps"
    assert values["update/seconds"] is None
    assert (values["pairs_per_second"], values["seconds_per_step"], values["data_wait"]) == (1.0, 2.0, 0.5)
    assert values["seconds_left"] == 16.0


def test_where_all_steps_compiled_nothing_is_said_of_speed(clock):
    made = Window(Config(batch_size=2), lambda records: 100.0, lambda *each: None)
    clock.seconds += 30.0
    made.add(batch(0, record(7, 3, 2), None), {"loss": metric(3, 1)}, health(), 9.0, untimed=30.0)
    values = made.close(1, 10, 0.0)
    assert values["loss"] == 3.0 and 0 < values["padding"] < 1
    speeds = "pairs_per_second", "tokens_per_second", "flops_per_second", "mfu", "data_wait"
    assert all(values[name] is None for name in (*speeds, "seconds_per_step", "seconds_left"))


def test_a_figure_that_nothing_weighs_in_is_none(clock):
    made = Window(Config(batch_size=2), lambda records: 0.0, lambda *each: None)
    made.add(batch(0, None, None), {"loss": metric(0, 0)}, health(), 0.0)
    clock.seconds += 1.0
    assert made.close(1, 1, 0.0)["loss"] is None


def test_steps_that_were_not_taken_are_reported_once(clock):
    told = []
    made = Window(Config(batch_size=2), lambda records: 0.0, lambda *each: told.append(each))
    both = record(7, 3, 2), record(10, 4, 4)
    made.add(batch(0, *both), {"loss": metric(0, 0)}, health(), 0.0)
    made.add(batch(1, *both), {"loss": metric(0, 0)}, health(False, (False, True)), 0.0)
    made.check()
    assert told == [(2, [1])], "the step, counted from 1, and whose log-probs are not finite"
    made.check()
    made.add(replace(batch(2, *both), indices=(8, 9)), {"loss": metric(0, 0)}, health(False), 0.0)
    clock.seconds += 1.0
    made.close(3, 3, 0.0)
    assert told == [(2, [1]), (3, [8, 9])], "all of a batch, where it can not be told"


def test_fillers_are_not_to_blame():
    assert culprits((4, 5, 6), health(False, (False, True, False, True))) == [5]
