"""Notices to end: SIGTERM, as before a machine is taken away, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mllm_align import locks, processes


class Notice:
    """notice(step) -> whether to save and end now. interrupted: by Ctrl-C, in this process."""

    def __init__(self):
        self.interrupted = self._terminated = False

    def __call__(self, step: int) -> bool:
        if processes.several():  # one notice ends all of them, at the same step
            return processes.preempted(step)
        return self.interrupted or self._terminated

    def terminate(self, *_: Any) -> None:
        self._terminated = True
        locks.ending()

    def interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("interrupted: this step is finished and saved; Ctrl-C again ends at once", file=sys.stderr)
        if processes.several():
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells all processes of
        locks.ending()


@contextmanager
def notice_to_end() -> Iterator[Notice]:
    """While the block runs, SIGTERM and a first Ctrl-C are notices; a second Ctrl-C raises
    KeyboardInterrupt. JAX handles the SIGTERM of several processes."""
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield notice
        return
    handlers = {signal.SIGINT: notice.interrupt}
    if not processes.several():
        handlers[signal.SIGTERM] = notice.terminate
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield notice
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
