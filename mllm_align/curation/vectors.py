"""Vectors in a folder, each under a digest of what it follows from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import processes
from mllm_align.errors import InputError
from mllm_align.files import new_file, read_json


class Vectors:
    """`entries` grows by one entry a vector, a digest of 32 bytes and the numbers, so work that was stopped
    goes on, and more may be added. `stamp.json` says what all of them follow from. Of several processes,
    which all compute, the first writes.

    stamp: JSON values. width: F of the vectors. option: that names the folder, for errors.
    """

    def __init__(self, folder: Path, stamp: dict[str, Any], width: int, option: str):
        self.folder, self.stamp = folder, stamp | {"width": width}
        self.entries, self.remedy = folder / "entries", f"give another {option}, or delete the folder"
        self.entry = np.dtype([("name", "u1", (32,)), ("vector", "<f4", (width,))])

    def open(self) -> dict[bytes, np.ndarray]:
        """What is there, by digests; what a kill left of an entry is taken away. Raises InputError for a
        folder of another stamp, or one that can't be read or written."""
        processes.on_first(self._check)
        try:
            if not self.entries.exists():
                return {}
            whole = self.entries.stat().st_size // self.entry.itemsize
            found = np.fromfile(self.entries, self.entry, whole)
            processes.on_first(lambda: os.truncate(self.entries, whole * self.entry.itemsize))
        except OSError as error:
            problem = f"can't read {self.entries} ({error.strerror or error})"
            raise InputError(f"{problem}; {self.remedy}") from error
        names = (each.tobytes() for each in found["name"])
        return dict(zip(names, found["vector"], strict=True))

    def _check(self) -> None:
        file = self.folder / "stamp.json"
        if not file.exists():
            with new_file(file) as out:
                out.write(json.dumps(self.stamp) + "\n")
            return
        found = read_json(file, self.remedy)
        differ = [name for name, value in self.stamp.items() if found.get(name) != value]
        if differ:
            raise InputError(f"{self.folder} belongs to another {', '.join(differ)}; {self.remedy}")

    def add(self, made: Mapping[bytes, np.ndarray]) -> None:
        rows = np.zeros(len(made), self.entry)
        for row, (name, vector) in zip(rows, made.items(), strict=True):
            row["name"], row["vector"] = np.frombuffer(name, np.uint8), vector
        processes.on_first(lambda: self._write(rows.tobytes()))

    def _write(self, data: bytes) -> None:
        try:
            with open(self.entries, "ab") as file:
                file.write(data)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"can't write {self.entries} ({reason}); make room, and run it again"
            ) from error
