"""SIGTERM and Ctrl-C are notices: the run saves and ends, and afterwards they do what they did before."""

import os
import signal
import threading

import pytest

from mllm_align import locks, processes
from mllm_align.training.preemption import notice_to_end


@pytest.fixture(autouse=True)
def no_locks(monkeypatch):
    told = []
    monkeypatch.setattr(locks, "ending", lambda: told.append(True))
    return told


def test_sigterm_is_noticed_and_handled_as_before_afterwards(no_locks):
    before = signal.getsignal(signal.SIGTERM)
    with notice_to_end() as noticed:
        assert not noticed(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noticed(2) and noticed(3) and no_locks == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_ends_at_once(no_locks, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), notice_to_end() as noticed:
        os.kill(os.getpid(), signal.SIGINT)
        assert noticed(1) and noticed.interrupted and no_locks == [True]
        assert "Ctrl-C again ends at once" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_of_several_processes_ctrl_c_is_a_notice_to_all(monkeypatch):
    """JAX sees the SIGTERM and tells the others."""
    monkeypatch.setattr(processes, "several", lambda: True)
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        with notice_to_end():
            os.kill(os.getpid(), signal.SIGINT)
            assert came == [True]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_handler_goes_whatever_happens():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), notice_to_end():
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_sets_no_handler():
    """Only the main thread may."""
    said = []

    def run():
        with notice_to_end() as noticed:
            said.append(noticed(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert said == [False]


def test_of_several_processes_one_notice_stops_all(monkeypatch):
    """At one step, which the coordination service agrees on."""
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "preempted", lambda step: step >= 5)
    with notice_to_end() as noticed:
        assert [noticed(step) for step in (4, 5)] == [False, True]
