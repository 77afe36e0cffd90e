"""The notice that a machine is about to be taken away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mllm_align import locks, processes


@contextmanager
def notice_of_preemption() -> Iterator[Callable[[int], bool]]:
    """asked(step) -> whether to save and end now: SIGTERM came, to this process or to another one."""
    came: list[int] = []
    if processes.several() or threading.current_thread() is not threading.main_thread():
        yield processes.preempted
        return

    def notice(number: int, _: Any) -> None:
        came.append(number)
        locks.ending()

    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
