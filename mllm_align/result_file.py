"""A result file: written whole or not at all, and by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mllm_align import processes
from mllm_align.errors import refusal
from mllm_align.files import new_file
from mllm_align.locks import alone


@contextmanager
def result(out: Path, data: Any) -> Iterator[IO[str]]:
    """The open file `out`; nothing where another process of the job writes it. data: a path or rows. Raises
    InputError if the file would replace its own data."""
    with alone(out):
        read = isinstance(data, str | os.PathLike) and os.path.exists(data)
        if read and os.path.exists(out) and os.path.samefile(out, data):
            raise refusal(str(out), "is the data file itself", "give another --out")
        try:
            with new_file(out) if processes.first() else open(os.devnull, "w") as file:
                yield file
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted; {out} is not written") from error
