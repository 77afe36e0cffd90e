"""Sums and weights of metrics, the log's lines, and the line on the terminal."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.errors import InputError, NotFinite
from mllm_align.training.metrics import Log, add, divide, duration, line


def test_several_steps_are_one_weighted_mean():
    """Of 3 values with mean 2 and one of 10: 4, not 6."""
    first = {"loss": (jnp.float32(6), jnp.float32(3)), "rate": (jnp.float32(1), jnp.float32(0))}
    second = {"loss": (jnp.float32(10), jnp.float32(1)), "rate": (jnp.float32(0), jnp.float32(0))}
    assert divide(add(first, second)) == {"loss": 4.0, "rate": None}


def test_the_loss_of_several_terms_is_the_sum_of_their_means():
    """Over steps, too: the sum under loss was scaled to the weights of its own step."""
    first = {"loss": (9.0, 2.0), "loss/pairs": (1.0, 2.0), "loss/tokens": (8.0, 4.0)}
    second = {"loss": (5.0, 2.0), "loss/pairs": (3.0, 2.0), "loss/tokens": (4.0, 8.0)}
    assert divide(add(first, second)) == {"loss": 2.0, "loss/pairs": 1.0, "loss/tokens": 1.0}
    alone = {"loss": (0.0, 0.0), "loss/pairs": (0.0, 0.0), "loss/tokens": (8.0, 4.0)}
    assert divide(alone) == {"loss": 2.0, "loss/pairs": None, "loss/tokens": 2.0}


def test_division_is_exact_in_64_bits():
    assert divide({"a": (np.float32(1), np.float32(3))}) == {"a": 1 / 3}


# ---- log.jsonl ---------------------------------------------------------------------------------------


class Kept:
    """Stands for trackers."""

    def __init__(self):
        self.logged, self.closed = [], False

    def log(self, step, values):
        self.logged.append((step, values))

    def close(self):
        self.closed = True


def lines(folder):
    return [json.loads(each) for each in (folder / "log.jsonl").read_text().splitlines()]


def test_every_line_is_written_at_once_and_after_those_before(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "before"}\n')
    log = Log(tmp_path)
    before = time.time()
    log("train", step=3, loss=0.5, margin=None)
    first, second = lines(tmp_path)
    assert first == {"event": "before"}
    assert second.pop("time") == pytest.approx(before, abs=5)
    assert list(second.items()) == [("event", "train"), ("step", 3), ("loss", 0.5), ("margin", None)]
    log("done")
    log.close()
    assert [each["event"] for each in lines(tmp_path)] == ["before", "train", "done"]


def test_a_figure_that_is_not_finite_is_not_written(tmp_path):
    kept = Kept()
    log = Log(tmp_path, kept)
    for value in (float("nan"), float("inf")):
        with pytest.raises(NotFinite, match="loss is not finite"):
            log("train", step=1, loss=value)
    log("train", step=2, loss=1.0)
    log.close()
    assert [each["step"] for each in lines(tmp_path)] == [2]
    assert kept.logged == [(2, {"train/loss": 1.0})]


def test_figures_for_trackers(tmp_path):
    """Numbers of lines that have a step; not the step, nor what is a text, whole or missing."""
    kept = Kept()
    log = Log(tmp_path, kept)
    log("start", model="m", seconds=1.5)
    log("train", step=3, loss=0.5, lr=1.0, rows=8, note="x", margin=None)
    log("save", step=3)
    log("eval", step=3, loss=0.25)
    assert kept.logged == [(3, {"train/loss": 0.5, "train/lr": 1.0}), (3, {"eval/loss": 0.25})]
    log.close()
    assert kept.closed


def test_a_process_that_does_not_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = Log(None)
    log("train", step=1, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line():
    log = Log(None)
    log._file.close()
    log._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(InputError, match="can't write /dev/full: No space left on device; make room"):
        log("train", step=1, loss=1.0)
    log.close()


# ---- the terminal ------------------------------------------------------------------------------------


def test_a_line_of_dpo():
    values = {
        "loss": 0.69314718,
        "rewards/margin": 1.25,
        "rewards/accuracy": 0.75,
        "grad_norm": 12.3456,
        "learning_rate": 1e-6,
        "pairs_per_second": 3.456,
        "other": 7.0,
    }
    assert line(7, 1200, values, 3725.4) == (
        "step    7/1200  loss 0.6931  margin 1.2500  acc 0.75  grad 12.3  lr 1.00e-06  pairs/s 3.46  "
        "1:02:05 left"
    )


def test_what_is_missing_is_left_out():
    assert line(9, 9, {"loss": None, "grad_norm": 0.0}, 0) == "step 9/9  no loss  grad 0  0:00 left"


def test_no_speed_and_no_time_left_before_a_step_was_timed():
    assert line(1, 9, {"loss": 0.5, "pairs_per_second": None}, None) == "step 1/9  loss 0.5000"


@pytest.mark.parametrize(
    "seconds, shown",
    [(0, "0:00"), (0.4, "0:00"), (0.5, "0:01"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown
