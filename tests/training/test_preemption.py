"""SIGTERM is a notice: the run saves and ends, and afterwards the signal does what it did before."""

import os
import signal
import threading

import pytest

from mllm_align import locks, processes
from mllm_align.training.preemption import notice_of_preemption


@pytest.fixture(autouse=True)
def no_locks(monkeypatch):
    told = []
    monkeypatch.setattr(locks, "ending", lambda: told.append(True))
    return told


def test_sigterm_is_noticed_and_handled_as_before_afterwards(no_locks):
    before = signal.getsignal(signal.SIGTERM)
    with notice_of_preemption() as noticed:
        assert not noticed(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noticed(2) and noticed(3) and no_locks == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_handler_goes_whatever_happens():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), notice_of_preemption():
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_sets_no_handler():
    """Only the main thread may."""
    said = []

    def run():
        with notice_of_preemption() as noticed:
            said.append(noticed(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert said == [False]


def test_of_several_processes_one_notice_stops_all(monkeypatch):
    """At one step, which the coordination service agrees on."""
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "preempted", lambda step: step >= 5)
    with notice_of_preemption() as noticed:
        assert [noticed(step) for step in (4, 5)] == [False, True]
