"""A job that may be stopped and continued: finished rows are appended to OUT.part until OUT is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from mllm_align import processes
from mllm_align.errors import Interrupted, NotFinite, Preempted, one_line, refusal
from mllm_align.files import json_text, new_file, parse_json


class PartFile:
    """OUT.part while it grows. Of several processes, which all make all rows, the first alone writes.

    Its first line is {job: stamp}; the stamp, with a config among its fields, is what the rows follow from.
    `finished`: rows by their index.
    """

    def __init__(
        self,
        out: Path,
        job: str,
        stamp: dict[str, Any],
        indices: Collection[int],
        complete: Callable[[dict[str, Any]], bool],
    ):
        """indices: of the records that rows may be of. complete: whether a row has what its readers need;
        may raise KeyError and TypeError if not."""
        self.out, self.job, self.stamp, self.indices, self.complete = out, job, stamp, indices, complete
        self.part = out.with_name(out.name + ".part")
        self.finished: dict[int, dict[str, Any]] = {}

    def open(self) -> None:
        """Read what an earlier run left, or begin. Raises InputError for another job's file."""
        with explained(self.out):
            if self.part.exists():
                self._resume()
                return
        with new_file(self.part) as file:
            file.write(json_text({self.job: self.stamp}) + "\n")

    def _resume(self) -> None:
        at = str(self.part)
        lines = self.part.read_bytes().split(b"\n")
        try:
            before, now = flat(parse_json(lines[0])[self.job]), flat(parse_json(json_text(self.stamp)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise refusal(at, "can't be resumed", "remove it or give another --out") from error
        differ = [name for name, value in now.items() if before.get(name) != value]
        if differ:
            raise refusal(
                at, f"was begun with another {', '.join(differ)}", "remove it or give another --out"
            )
        whole = len(lines[0]) + 1
        for number, line in enumerate(lines[1:-1], 2):  # what follows the last line break was cut short
            try:
                row = parse_json(line)
                json_text(row)  # it will be written again: no NaN may stand in it
                good = type(row["index"]) is int and row["index"] in self.indices and self.complete(row)
            except (ValueError, KeyError, TypeError, NotFinite):
                good = False
            if not good:
                raise refusal(f"{at} line {number}", "is damaged", "remove the file or that line")
            self.finished[row["index"]] = row
            whole += len(line) + 1
        with open(self.part, "r+b") as file:
            file.truncate(whole)

    def __enter__(self) -> Self:
        with explained(self.part):
            place = self.part if processes.first() else os.devnull
            self._file = open(place, "a", encoding="utf-8")
        begins = f"resuming {self.out}: {self._done()}" if self.finished else f"starting {self.out}"
        processes.say(begins)
        self._before = None
        if threading.current_thread() is threading.main_thread() and not processes.several():
            self._before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        with suppress(OSError):  # after a write that failed, closing tries it again
            self._file.close()
        if not self.finished and processes.first():
            self.part.unlink()
        if kind is KeyboardInterrupt:
            raise Interrupted(f"interrupted; {self._done()}") from error

    def _terminate(self, *_: Any) -> None:
        raise Preempted(f"preempted; {self._done()}")

    def _done(self) -> str:
        return f"{len(self.finished)} of {len(self.indices)} records are done"

    def add(self, index: int, row: dict[str, Any]) -> None:
        row = {"index": index, **row}
        with explained(self.part):
            self._file.write(json_text(row) + "\n")
            self._file.flush()
        self.finished[index] = row


def tell_finished(out: Path) -> None:
    processes.say(f"{out} is finished: nothing to do")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """An OSError of the body as one line."""
    try:
        yield
    except OSError as error:
        problem = f"can't be written ({one_line(error.strerror)})"
        raise refusal(str(path), problem, "free space or repair the folder, then run it again") from error


def flat(stamp: dict[str, Any]) -> dict[str, Any]:
    """A stamp with the fields of its config one by one, so that what differs can be named."""
    return {**{f"config.{name}": value for name, value in stamp["config"].items()}, **stamp, "config": None}
