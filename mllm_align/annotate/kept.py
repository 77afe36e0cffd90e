"""Answers of a model or an endpoint on disk, so that what was asked once is never asked again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mllm_align.errors import InputError, refusal
from mllm_align.files import parse_json


class Kept:
    """Answers by the keys of their requests, and the number of requests sent, over restarts.

    A process adds to files of its own and reads the answers of all: runs go on with any number of them.
    """

    def __init__(self, folder: Path | None, process: int):
        self.answers: dict[str, str] = {}
        self.requests = 0
        self._answers = self._requests = None
        if folder is None:
            return
        self._answers = folder / f"answers-{process:05d}.jsonl"
        self._requests = folder / f"requests-{process:05d}.txt"
        for file in sorted(folder.glob("answers-*.jsonl")):
            self._read(file)
        with _explained("read", self._requests):
            self.requests = self._requests.stat().st_size if self._requests.exists() else 0

    def count(self) -> None:
        """Before a request is sent, so that a kill can't hide it; one byte each."""
        self.requests += 1
        if self._requests is not None:
            if self.requests == 1:  # a run that can't begin must leave nothing
                with _explained("write", self._requests.parent):
                    self._requests.parent.mkdir(parents=True, exist_ok=True)
            _append(self._requests, b".")

    def add(self, key: str, answer: str) -> None:
        self.answers[key] = answer
        if self._answers is not None:
            _append(self._answers, json.dumps({"key": key, "answer": answer}).encode() + b"\n")

    def _read(self, file: Path) -> None:
        with _explained("read", file):
            *lines, half = file.read_bytes().split(b"\n")
        if half and file == self._answers:  # a kill cut it; of other processes' files it may be growing
            with _explained("write", file):
                os.truncate(file, file.stat().st_size - len(half))
        for number, line in enumerate(lines, 1):
            try:
                kept = parse_json(line)
                key, answer = kept["key"], kept["answer"]
            except (ValueError, LookupError, TypeError):
                key = answer = None
            if not isinstance(key, str) or not isinstance(answer, str):
                remedy = "delete the line; its question is asked again"
                raise refusal(f"{file} line {number}", "this is no kept answer", remedy)
            self.answers[key] = answer


def _append(file: Path, data: bytes) -> None:
    """Whole or not at all, as far as that can be had without a new file for each."""
    with _explained("write", file):
        before = file.stat().st_size if file.exists() else 0
        try:
            with open(file, "ab") as out:
                out.write(data)
        except OSError:
            with suppress(OSError):
                os.truncate(file, before)
            raise


@contextmanager
def _explained(doing: str, file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "make room or check its permissions" if doing == "write" else "check its permissions"
        raise InputError(f"can't {doing} {file}: {error.strerror or error}; {remedy}") from error
