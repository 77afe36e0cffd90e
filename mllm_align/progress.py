"""Progress bars on stderr."""

from __future__ import annotations

import sys

from tqdm import tqdm

EVERY = 10.0  # seconds between lines where stderr is no terminal


def progress_bar(total: int, what: str, unit: str = "record") -> tqdm:
    """A bar on stderr: done, rate, time left. If stderr is not a terminal, a line every EVERY seconds."""
    quiet = not sys.stderr.isatty()
    wait = EVERY if quiet else 0.5
    return tqdm(total=total, desc=what, unit=unit, mininterval=wait, delay=quiet * wait, leave=not quiet)
