"""Other images for the records of data sets: those that a model's vision tower takes for most alike.

Re-Align (arXiv 2502.13146): the images of a set are compared by the model's own tower; the neighbours are
the second image of losses on two images, and what misleads the policy in `bdhs --distortion retrieved`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.config import DataConfig
from mllm_align.config.checks import MANY, check_number
from mllm_align.curation.image_index import ImageIndex
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.writing import check_name, write
from mllm_align.data.encode import image_digest
from mllm_align.data.images import ImageSource
from mllm_align.data.mixture import set_names
from mllm_align.errors import InputError, Interrupted, first_few
from mllm_align.locks import alone
from mllm_align.models.bundle import Bundle, opened
from mllm_align.ops.nearest import nearest
from mllm_align.prepare import make_encoder

MOST = 64  # neighbours
SIMILARITY = "neighbour_similarity"


def retrieve(
    files: Sequence[Path],
    out: Path,
    model: str | Path | Bundle,
    *,
    neighbours: int = 5,
    index: Path | None = None,
    pool: Sequence[Path] = (),
    batch_size: int = 8,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Write `out`: the records with the nearest neighbours of their images.

    Each record has `rejected_images`, the nearest neighbour of each image; `neighbour_images`, all
    `neighbours` of them, the nearest first; and `neighbour_similarity`, the cosines of these. The same
    picture is no neighbour of itself, under any name. index: folder of the vectors; default: out.index.
    pool: data sets whose images may be neighbours; default: those of `files`. Records without an image are
    left out. Returns counts: records, without_image (ids), images, indexed (vectors computed now), and
    similarity, the quantiles 0.05, 0.5 and 0.95 of the nearest neighbours'. Raises InputError for data, a
    model or an index that can't be used, and where there are too few images; NotFinite where features are
    not finite.
    """
    check_name(out)
    check_number("--neighbours", neighbours, 1, MOST)
    check_number("--batch-size", batch_size, 1, MANY)
    config = data or DataConfig()
    items = _items(files, config)
    asked = [item for item in items if item.record.images]
    if not asked:
        raise InputError(f"no record of {', '.join(map(str, files))} has an image; give some that have")
    folder = out.with_suffix(".index") if index is None else index
    images = _Images()
    own = [images(item) for item in asked]
    pool_names = dict.fromkeys(name for item in _items(pool, config) for name in images(item))
    candidates = [*(pool_names or images.found)]
    with alone(out, folder):
        try:
            bundle = opened(model)
            known = ImageIndex(folder, bundle, make_encoder(bundle, config))
            vectors, indexed = known(images.found, batch_size)
        except KeyboardInterrupt as error:
            raise Interrupted(f"interrupted; the vectors so far are kept in {folder}") from error
        rows = dict(zip(images.found, vectors, strict=True))
        found = _neighbours(
            rows, dict.fromkeys(name for each in own for name in each), candidates, neighbours
        )
        write([_with(item, each, found, images.found) for item, each in zip(asked, own, strict=True)], out)
    quantiles = np.quantile([near[0][1] for near in found.values()], (0.05, 0.5, 0.95))
    return {
        "records": len(items),
        "without_image": [item.record.id for item in items if not item.record.images],
        "images": len(images.found),
        "indexed": indexed,
        "similarity": [round(float(each), 4) for each in quantiles],
    }


def told(found: dict[str, Any]) -> str:
    """What came of it, in two lines."""
    without, (low, middle, high) = found["without_image"], found["similarity"]
    text = f"{found['records'] - len(without):,} of {found['records']:,} records"
    text += f" ({len(without):,} have no image: {first_few(without)})" if without else ""
    text += f"; {found['images']:,} images, of which {found['indexed']:,} were indexed now"
    return f"{text}\ncosine of the nearest neighbour: {middle:.3f} (5 %: {low:.3f}, 95 %: {high:.3f})"


def _items(files: Sequence[Path], config: DataConfig) -> list[Item]:
    return [item for name, file in set_names(files).items() for item in read_items(file, name, config)]


Neighbours = list[tuple[bytes, float]]
"""Digests of images and their cosines, the nearest first."""


def _neighbours(
    rows: dict[bytes, np.ndarray], asked: Iterable[bytes], candidates: Sequence[bytes], count: int
) -> dict[bytes, Neighbours]:
    """Of each image that is asked about, without itself."""
    asked, place = list(asked), {name: number for number, name in enumerate(candidates)}
    own = np.array([place.get(name, -1) for name in asked], np.int32)
    if len(candidates) - (own >= 0).any() < count:
        others = f"there are {len(candidates)} different images"
        raise InputError(f"--neighbours is {count}, and {others}; ask for fewer, or name more with --pool")
    queries, pool = (np.stack([rows[name] for name in names]) for names in (asked, candidates))
    places, scores = nearest(queries, pool, count, own)
    return {
        name: [(candidates[p], float(s)) for p, s in zip(near, of, strict=True)]
        for name, near, of in zip(asked, places, scores, strict=True)
    }


def _with(
    item: Item, own: Sequence[bytes], found: dict[bytes, Neighbours], images: dict[bytes, ImageSource]
) -> Item:
    """The record with its images' neighbours: first the nearest of each image, then the next of each."""
    near = [each for several in zip(*(found[name] for name in own), strict=True) for each in several]
    others = tuple(images[name] for name, _ in near)
    record = replace(item.record, rejected_images=others[: len(own)], neighbour_images=others)
    return replace(item, record=record, fields=item.fields | {SIMILARITY: [round(s, 6) for _, s in near]})


class _Images:
    """Pictures by the digest of their bytes; each file is read once."""

    def __init__(self) -> None:
        self.found: dict[bytes, ImageSource] = {}
        self._known: dict[Hashable, bytes] = {}

    def __call__(self, item: Item) -> list[bytes]:
        names = []
        for source in item.record.images:
            name = self._known.get(source.key) or image_digest(source)
            self._known[source.key] = name
            self.found.setdefault(name, source)
            names.append(name)
        return names
