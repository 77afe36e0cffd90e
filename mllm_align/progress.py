"""Progress bars on stderr."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str = "record") -> tqdm:
    """A bar on stderr: done, rate, time left. If stderr is not a terminal, a line every 10 s."""
    quiet = not sys.stderr.isatty()
    wait = 10 if quiet else 0.5
    return tqdm(total=total, desc=what, unit=unit, mininterval=wait, delay=quiet * wait, leave=not quiet)
