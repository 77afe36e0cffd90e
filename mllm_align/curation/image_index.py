"""An index of images by a model's own vision tower, kept in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from mllm_align import processes
from mllm_align.batch import Pixels, Shape
from mllm_align.config import SamplingConfig
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.images import ImageSource, image_size
from mllm_align.data.records import Record
from mllm_align.errors import InputError, not_finite
from mllm_align.files import new_file, read_json
from mllm_align.generation.bdhs_job import trained_digest
from mllm_align.generation.decode import Generator
from mllm_align.models.bundle import Bundle
from mllm_align.prepare import name_weights, pixels_ahead
from mllm_align.progress import progress_bar

REMEDY = "give another --index, or delete it and it is made again"


class ImageIndex:
    """Vectors of images in a folder, each image once, by the digest of its file.

    An image's vector is the mean of the tower's features over the tiles that show all of it
    (`Layout.overview`), of length 1, so an inner product is a cosine. `entries` grows by one entry an
    image, a digest and a vector: a computation that was stopped goes on, and another set's images are
    added. `stamp.json` says which model they are of.
    """

    def __init__(self, folder: Path, bundle: Bundle, encoder: Encoder):
        self.folder, self.bundle, self.encoder = folder, bundle, encoder
        self.entries, self.stamp_file = folder / "entries", folder / "stamp.json"
        width = bundle.config.vision.features
        self.entry = np.dtype([("image", "u1", (32,)), ("vector", "<f4", (width,))])

    def __call__(self, images: Mapping[bytes, ImageSource], rows: int) -> tuple[np.ndarray, int]:
        """([n, F] float32, number of those that were computed now): vectors of images, named by their
        digests, in order. rows: images at once.

        Raises InputError for a folder of another model or one that can't be read or written, and for images
        that can't be read; NotFinite for features that are not finite, which are not kept.
        """
        name_weights(self.bundle.folder)
        processes.on_first(self._check)
        known = self._read()
        todo = {name: source for name, source in images.items() if name not in known}
        known |= self._make(todo, rows)
        return np.stack([known[name] for name in images]), len(todo)

    def _check(self) -> None:
        """Begin, or refuse another model's folder."""
        settings = self.encoder.processor.image_processor.to_json_string()
        stamp = {"model": self.bundle.folder.fingerprint, "image_processor": json.loads(settings)}
        tower = self.bundle.trained.get("params", {}).get("vision_tower")
        stamp |= {
            "trained": trained_digest(tower),
            "dtype": str(np.dtype(self.bundle.dtype)),
            "bytes": self.entry.itemsize,
        }
        if not self.stamp_file.exists():
            with new_file(self.stamp_file) as file:
                file.write(json.dumps(stamp) + "\n")
            return
        found = read_json(self.stamp_file, REMEDY)
        differ = [name for name, value in stamp.items() if found.get(name) != value]
        if differ:
            raise InputError(f"{self.folder} is an index by another {', '.join(differ)}; {REMEDY}")

    def _read(self) -> dict[bytes, np.ndarray]:
        """What is there; what a kill left of an entry is taken away."""
        try:
            if not self.entries.exists():
                return {}
            whole = self.entries.stat().st_size // self.entry.itemsize
            found = np.fromfile(self.entries, self.entry, whole)
            processes.on_first(lambda: os.truncate(self.entries, whole * self.entry.itemsize))
        except OSError as error:
            raise InputError(f"can't read {self.entries} ({error.strerror or error}); {REMEDY}") from error
        names = (each.tobytes() for each in found["image"])
        return dict(zip(names, found["vector"], strict=True))

    def _make(self, todo: Mapping[bytes, ImageSource], rows: int) -> dict[bytes, np.ndarray]:
        """Every process computes, the first writes."""
        made, broken = {}, []
        generator = Generator(self.bundle, SamplingConfig(), rows)
        pictures = pixels_ahead(self.encoder, [_alone(each) for each in todo.values()], 2 * generator.size)
        names, overview = iter(todo), self.encoder.layout.overview
        with progress_bar(len(todo), "indexing") as bar:
            while some := [
                Pixels(*(x[overview] for x in each)) for each in islice(pictures, generator.size)
            ]:
                vectors = [_mean(each) for each in generator.features(some)]
                part = dict(zip(islice(names, len(some)), vectors, strict=True))
                good = {name: vector for name, vector in part.items() if np.isfinite(vector).all()}
                broken += [todo[name].label for name in part if name not in good]
                processes.on_first(partial(self._write, good))
                made |= good
                bar.update(len(some))
        if broken:
            raise not_finite("features are", broken, len(todo))
        return made

    def _write(self, made: Mapping[bytes, np.ndarray]) -> None:
        rows = np.zeros(len(made), self.entry)
        for row, (name, vector) in zip(rows, made.items(), strict=True):
            row["image"], row["vector"] = np.frombuffer(name, np.uint8), vector
        try:
            with open(self.entries, "ab") as file:
                file.write(rows.tobytes())
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"can't write {self.entries} ({reason}); make room, and run it again"
            ) from error


def _mean(features: np.ndarray) -> np.ndarray:
    """[F] float32 of length 1, of features [n, F]."""
    mean = features.astype(np.float32).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean / np.linalg.norm(mean)


def _alone(source: ImageSource) -> Encoded:
    """An image as a record of which pixels can be read."""
    record = Record("", (), (), (source,), source.where)
    return Encoded(record, np.zeros(0, np.int32), (), (image_size(source),), Shape(0, 0, 0))
