"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress_bar(total: int, what: str, unit: str = "record") -> tqdm:
    """A bar on stderr: done, rate, time left. Rare lines where stderr is no terminal."""
    quiet = not sys.stderr.isatty()
    wait = 10 if quiet else 0.5
    return tqdm(total=total, desc=what, unit=unit, mininterval=wait, delay=quiet * wait, leave=not quiet)


def progress(items: Sequence[T], what: str, unit: str = "record") -> Iterator[T]:
    """Iterate under a progress bar."""
    with progress_bar(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.update()
