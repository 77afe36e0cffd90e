"""Progress on stderr: a bar on a terminal, rare lines elsewhere."""

import io
from itertools import pairwise

import pytest

from mllm_align import progress


class Stderr(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    """stderr(terminal) stands for the process's own."""

    def replaced(terminal):
        file = Stderr(terminal)
        monkeypatch.setattr(progress.sys, "stderr", file)
        return file

    return replaced


@pytest.fixture
def clock(monkeypatch):
    """tqdm's clock; `clock.now` is set by hand."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr("tqdm.std.tqdm._time", lambda self: Clock.now, raising=False)
    monkeypatch.setattr("tqdm.std.time", lambda: Clock.now)
    return Clock


def test_a_terminal_gets_a_bar_that_stays(stderr):
    file = stderr(True)
    with progress.progress_bar(4, "reading") as bar:
        bar.update(4)
    assert "reading: 100%" in file.getvalue() and "4/4" in file.getvalue()
    assert file.getvalue().endswith("\n")


def test_elsewhere_short_work_says_nothing(stderr, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 10.0)
    file = stderr(False)
    with progress.progress_bar(4, "reading") as bar:
        bar.update(4)
    assert file.getvalue() == ""


def test_elsewhere_a_line_comes_every_ten_seconds(stderr, clock, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 10.0)
    file = stderr(False)
    with progress.progress_bar(1000, "reading", unit="tile") as bar:
        said = []
        for _ in range(60):
            clock.now += 1
            before = file.getvalue()
            bar.update(1)
            said.append(file.getvalue() != before)
    told = [second for second, new in enumerate(said, 1) if new]
    assert 4 <= len(told) <= 6 and told[0] >= 10
    assert all(late - early >= 10 for early, late in pairwise(told))
    assert "tile/s" in file.getvalue()
