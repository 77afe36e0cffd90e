"""Which steps a trace holds; a real one is in test_loop.py."""

import pytest

from mllm_align.training import profiler
from mllm_align.training.profiler import Profile


@pytest.fixture
def trace(monkeypatch):
    told = []
    monkeypatch.setattr(profiler.jax, "block_until_ready", lambda result: told.append(f"wait {result}"))
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda *_, **__: told.append("start"))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


def test_the_first_step_is_not_traced_as_it_compiles(trace, tmp_path):
    profile = Profile(tmp_path, 2)
    for step in range(1, 6):
        profile.step(step)
    profile.close()
    assert trace == ["wait 1", "start", "wait 3", "stop"], "steps 2 and 3"


def test_a_run_that_ends_before_closes_its_trace(trace, tmp_path):
    profile = Profile(tmp_path, 9)
    profile.step(1)
    profile.close()
    profile.close()
    assert trace == ["wait 1", "start", "stop"]


def test_none_is_asked_for(trace, tmp_path):
    profile = Profile(tmp_path, 0)
    profile.step(1)
    profile.close()
    assert trace == []
