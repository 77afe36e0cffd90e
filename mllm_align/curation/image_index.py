"""An index of images by a model's own vision tower, kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from mllm_align.batch import Pixels, Shape
from mllm_align.config import SamplingConfig
from mllm_align.curation.vectors import Vectors
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.images import ImageSource, image_size
from mllm_align.data.records import Record
from mllm_align.errors import not_finite
from mllm_align.generation.bdhs_job import trained_digest
from mllm_align.generation.decode import Generator
from mllm_align.models.bundle import Bundle
from mllm_align.prepare import name_weights, pixels_ahead
from mllm_align.progress import progress_bar


class ImageIndex:
    """Vectors of images in a folder, each image once, by the digest of its file.

    An image's vector is the mean of the tower's features over the tiles that show all of it
    (`Layout.overview`), of length 1, so an inner product is a cosine.
    """

    def __init__(self, folder: Path, bundle: Bundle, encoder: Encoder):
        self.bundle, self.encoder = bundle, encoder
        name_weights(bundle.folder)
        settings = json.loads(encoder.processor.image_processor.to_json_string())
        tower = bundle.trained.get("params", {}).get("vision_tower")
        stamp = {"model": bundle.folder.fingerprint, "trained": trained_digest(tower)}
        stamp |= {"image_processor": settings, "dtype": str(np.dtype(bundle.dtype))}
        self.kept = Vectors(folder, stamp, bundle.config.vision.features, "--index")

    def __call__(self, images: Mapping[bytes, ImageSource], rows: int) -> tuple[np.ndarray, int]:
        """([n, F] float32, number of those that were computed now): vectors of images, named by their
        digests, in order. rows: images at once.

        Raises InputError for a folder of another model or one that can't be read or written, and for images
        that can't be read; NotFinite for features that are not finite, which are not kept.
        """
        known = self.kept.open()
        todo = {name: source for name, source in images.items() if name not in known}
        known |= self._make(todo, rows)
        return np.stack([known[name] for name in images]), len(todo)

    def _make(self, todo: Mapping[bytes, ImageSource], rows: int) -> dict[bytes, np.ndarray]:
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
                self.kept.add(good)
                made |= good
                bar.update(len(some))
        if broken:
            raise not_finite("features are", broken, len(todo))
        return made


def _mean(features: np.ndarray) -> np.ndarray:
    """[F] float32 of length 1, of features [n, F]."""
    mean = features.astype(np.float32).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean / np.linalg.norm(mean)


def _alone(source: ImageSource) -> Encoded:
    """An image as a record of which pixels can be read."""
    record = Record("", (), (), (source,), source.where)
    return Encoded(record, np.zeros(0, np.int32), (), (image_size(source),), Shape(0, 0, 0))
