"""What a run tells on the terminal."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import MODEL, TINY, one_device

from mllm_align.batch import Shape
from mllm_align.config import LoraConfig
from mllm_align.models.bundle import load
from mllm_align.training import terminal
from mllm_align.training.terminal import Clock, number, waiting

SHAPES = [Shape(64, 8, 1), Shape(96, 16, 5)]


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now.seconds)
    return now


def test_where_the_time_went(clock):
    spent = Clock()
    with spent.spent("saving"):
        clock.seconds += 6
    with spent.spent("evaluating"):
        clock.seconds += 0.4  # under a second is not worth a word
    with pytest.raises(ZeroDivisionError), spent.spent("saving"):
        clock.seconds += 5
        raise ZeroDivisionError
    clock.seconds += 60
    assert spent.text() == "1:11 (saving 0:11)"


def test_without_anything_but_steps(clock):
    spent = Clock()
    clock.seconds += 5
    assert spent.text() == "0:05"


def test_only_what_takes_long_is_told(capsys):
    with waiting("reading", 0.01):
        time.sleep(0.2)
    with waiting("opening", 60):
        pass
    assert capsys.readouterr().out == "reading\n"


@pytest.mark.parametrize(
    "count, shown", [(999, "999"), (1234, "1,234"), (2_500_000, "2.5 M"), (7_050_832_896, "7.05 B")]
)
def test_numbers(count, shown):
    assert number(count) == shown


def test_start():
    bundle = load(MODEL, "float32", one_device())
    trained = {"params": {"multi_modal_projector": np.zeros((10, 10))}, "lora": {"a": np.zeros(50)}}
    config = replace(TINY, lora=LoraConfig(rank=4), batch_size=4, save_every=20)
    said = terminal.start(config, bundle, Path("run"), 0, 30, (60, 2, 7), SHAPES, trained)
    first, model, *rest = said.splitlines()
    assert first == "starting run: 30 steps"
    assert "parameters in float32, on 1 x cpu" in model
    assert [" ".join(line.split()) for line in rest] == [
        "trains 150 parameters: LoRA of rank 4, multi_modal_projector",
        "data 60 records, 2 left out, 7 held out, 4 a step, 2 epochs in all",
        "shapes 2; the first step of each compiles",
        "saves every 20 steps; Ctrl-C or SIGTERM: after the step under way",
    ]
    again = terminal.start(config, bundle, Path("run"), 10, 30, (60, 0, 0), SHAPES, trained)
    assert again.startswith("resuming run: 10 of 30 steps are done\n") and "left out" not in again


def test_the_end_names_the_next_command(clock):
    spent = Clock()
    said = terminal.done(Path("run"), spent, 20, 30, None).splitlines()
    assert [" ".join(line.split()) for line in said] == [
        "done: 20 steps in 0:00",
        "saved step 30",
        "next mllm-align export --run run --out FOLDER",
    ]
    best = terminal.done(Path("run"), spent, 1, 30, (20, "the least held-out loss, 0.5123,"))
    assert "done: 1 step in" in best and "loss, 0.5123, is that of step 20" in best
    assert "export --run run --step best --out FOLDER" in best
    assert "--step best" not in terminal.done(Path("run"), spent, 1, 30, (30, "the best"))
