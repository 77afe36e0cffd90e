"""The vision tower's features of a data set, computed once and read from disk in every step.

A frozen tower gives the same features in every epoch, for policy and reference alike. They lie in two
files of a folder: `tiles`, [tiles, I, F] in the dtype of the computation, each image once in the order of
the data; and `stamp.json`, what they belong to. `tiles.part` grows record by record, so a computation that
was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Hashable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import processes
from mllm_align.config import SamplingConfig
from mllm_align.data.encode import Encoded, Encoder, image_digest
from mllm_align.errors import InputError
from mllm_align.files import new_file, read_json
from mllm_align.generation.decode import Generator
from mllm_align.models.bundle import Bundle
from mllm_align.prepare import name_weights, pixels_ahead
from mllm_align.progress import progress_bar

REMEDY = "delete the folder, and they are computed again"


class StoredFeatures:
    """Features in a folder; records with the same images share them. Number of a record -> [t, I, F] for
    each of its prefixes. seed: of crops and noise, which are those of the first pass over the data."""

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        encoder: Encoder,
        records: Sequence[Encoded],
        seed: int = 0,
    ):
        self.folder, self.bundle, self.encoder, self.seed = folder, bundle, encoder, seed
        self.tiles, self.stamp_file = folder / "tiles", folder / "stamp.json"
        self.starts: list[int] = []
        parts = [part for record in records for part in record.parts]
        self.prefixes = len(parts) // len(records)
        self.counts = [each.shape.tiles for each in parts]
        self.firsts: list[Encoded] = []  # the first record with its images
        seen: dict[Hashable, int] = {}
        total = 0
        for number, record in enumerate(parts):
            keys = tuple(source.key for source in record.record.images)
            start = seen.setdefault(number if None in keys else (record.identity, keys), total)
            if start == total and record.shape.tiles:
                self.firsts.append(record)
                total += record.shape.tiles
            self.starts.append(start)
        vision = bundle.config.vision
        self.shape = total, vision.tokens, vision.features
        self.table = np.zeros((0, *self.shape[1:]), bundle.dtype)

    def __call__(self, number: int) -> list[np.ndarray]:
        parts = range(number * self.prefixes, (number + 1) * self.prefixes)
        return [self.table[self.starts[i] : self.starts[i] + self.counts[i]] for i in parts]

    def load_or_make(self, rows: int, threads: int) -> StoredFeatures:
        """Open the files; compute them where they are not there yet, `rows` records at a time.

        Raises InputError for files of another model, data or dtype, and where they can't be written or
        read.
        """
        name_weights(self.bundle.folder)
        stamp = processes.on_first(self._stamp)
        if not processes.on_first(lambda: self._done(stamp)):
            self._make(stamp, rows, threads)
        processes.gathered(self._open)
        return self

    def _open(self) -> None:
        if not self.firsts:
            return
        try:
            self.table = np.memmap(self.tiles, self.bundle.dtype, "r", shape=self.shape)
        except (OSError, ValueError) as error:
            remedy = "the run folder must be on a disk that all processes share, and whole: " + REMEDY
            raise InputError(f"can't read {self.tiles} ({error}); {remedy}") from error

    def _stamp(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.bundle.processor.image_processor.to_json_string().encode())
        for record in self.firsts:
            if record.identity:
                digest.update(f"{record.identity} {self.seed}".encode())
            for source in record.record.images:
                digest.update(image_digest(source))
        named = {"model": self.bundle.folder.fingerprint, "images": digest.hexdigest()[:16]}
        return named | {"dtype": self.bundle.kept, "shape": list(self.shape)}

    def _done(self, stamp: dict[str, Any]) -> bool:
        if not self.stamp_file.exists():
            return False
        found = read_json(self.stamp_file, REMEDY)
        if found != stamp:
            raise InputError(f"{self.folder} belongs to {found}, this run is {stamp}; {REMEDY}")
        return self.tiles.exists()

    def _make(self, stamp: dict[str, Any], rows: int, threads: int) -> None:
        """Every process computes, the first writes."""
        begun = processes.on_first(lambda: self._begin(stamp))
        todo = self.firsts[begun:]
        generator = Generator(self.bundle, SamplingConfig(), rows)
        pictures = pixels_ahead(self.encoder, todo, 2 * generator.size, threads, (self.seed, 0))
        with progress_bar(len(self.firsts), "features") as bar:
            bar.update(begun)
            while some := list(islice(pictures, generator.size)):
                processes.on_first(partial(self._write, generator.features(some)))
                bar.update(len(some))
        processes.on_first(lambda: os.replace(self._part, self.tiles))

    @property
    def _part(self) -> Path:
        return self.folder / "tiles.part"

    @property
    def _tile_bytes(self) -> int:
        return math.prod(self.shape[1:]) * np.dtype(self.bundle.dtype).itemsize

    def _begin(self, stamp: dict[str, Any]) -> int:
        """Records of `firsts` that an earlier start has computed; the file holds them alone then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.stamp_file.exists():
            self._part.unlink(missing_ok=True)
            with new_file(self.stamp_file) as file:
                file.write(json.dumps(stamp) + "\n")
        there = self._part.stat().st_size // self._tile_bytes if self._part.exists() else 0
        done, tiles = 0, 0
        for record in self.firsts:
            if tiles + record.shape.tiles > there:
                break
            done, tiles = done + 1, tiles + record.shape.tiles
        if self._part.exists():
            os.truncate(self._part, tiles * self._tile_bytes)
        needed = (self.shape[0] - tiles) * self._tile_bytes
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise InputError(
                f"stored features need {needed / 2**30:.1f} GiB in {self.folder}, and "
                f"{free / 2**30:.1f} are free; make room, or leave out --features stored"
            )
        return done

    def _write(self, found: list[np.ndarray]) -> None:
        try:
            with open(self._part, "ab") as file:
                file.writelines(np.ascontiguousarray(each, self.bundle.dtype).tobytes() for each in found)
        except OSError as error:
            raise InputError(f"can't write features to {self._part}: {error}; make room") from error
