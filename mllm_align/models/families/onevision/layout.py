"""LLaVA-OneVision's images: AnyRes tiles as LLaVA-1.6 cuts them, scaled down where they are many.

Of several images in a prompt each is one tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run
from mllm_align.models.families.llava.layout import LlavaLayout, joined, unpad

MARGIN = 1.1  # how much longer a side may be before the picture is scaled down


@dataclass(frozen=True)
class OneVisionLayout(LlavaLayout):
    """most: tiles whose embeddings a picture of more is scaled down to."""

    most: int = 9
    taps = 3  # an embedding is mixed of four neighbours

    @cached_property
    def largest(self) -> tuple[tuple[int, int], ...]:
        """Beside the canvases, pictures that leave as much of one empty as keeps them from being scaled."""
        sizes = list(self.pinpoints)
        for height, width in self.pinpoints:
            rows, columns = (side // self.size * self.side for side in (height, width))
            fits = (c for c in range(columns, 0, -2) if self.scaled(rows, c) == (rows, c))
            sizes += [(height, math.ceil(c * height / rows)) for c in (next(fits, 0),) if c]
            fits = (r for r in range(rows, 0, -2) if self.scaled(r, columns) == (r, columns))
            sizes += [(math.ceil(r * width / columns), width) for r in (next(fits, 0),) if r]
        return tuple(sizes)

    def grid(self, height: int, width: int, images: int = 1) -> tuple[int, int] | None:
        return super().grid(height, width) if images == 1 else None

    def scaled(self, rows: int, columns: int) -> tuple[int, int]:
        """Lines and columns of embeddings that a picture of this many becomes."""
        ratio = math.sqrt(rows * columns / (self.most * self.side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > MARGIN else (rows, columns)

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        """The base tile, then the tiles joined to one picture, unpadded and scaled, one newline (row 0) at
        the end of each line. Of several images the base tile and one newline."""
        start = 1 + tile * self.tokens
        base = np.arange(start, start + self.tokens, dtype=np.int32)
        grid = self.grid(height, width, images)
        if grid is None:
            return [Run(np.append(base, np.int32(0)))]
        picture = unpad(joined(start + self.tokens, grid, self.side), height, width)
        scaled = self.scaled(*picture.shape)
        if scaled == picture.shape:
            return super().runs(height, width, images, tile)
        of_base = np.zeros((4, len(base)), np.int32)
        of_base[0] = base
        rows, shares = (
            np.pad(x, ((0, 0), (0, 0), (0, 1))).reshape(4, -1) for x in bilinear(picture, *scaled)
        )
        rows = np.concatenate([of_base, rows], axis=1)
        return [Run(rows[0], rows[1:], np.pad(shares[1:], ((0, 0), (len(base), 0))))]

    def pixels(self, process: Any, image: Image.Image, images: int = 1) -> Pixels:
        if images == 1:
            return super().pixels(process, image)
        # the processor cuts what stands alone, and makes a square of what does not
        made = process([[image, Image.new("RGB", (1, 1))]], return_tensors="np")["pixel_values"][0]
        return self.checked(made, 1)


def bilinear(picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows [4, height, width], their shares) of the entries around each place of a picture scaled to this
    size: corners do not meet, for entries have area; in float32, as torch does it. A row without a share is
    0."""
    (up, down, low), (left, right, far) = map(_neighbours, picture.shape, (height, width))
    rows = np.stack([picture[y][:, x] for y in (up, down) for x in (left, right)])
    shares = np.stack([np.outer(y, x) for y in (1 - low, low) for x in (1 - far, far)])
    return np.where(shares > 0, rows, 0), shares


def _neighbours(count: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` places along `count` entries: the entry before, the one after, and its share."""
    half = np.float32(0.5)
    at = np.float32(count) / np.float32(new) * (np.arange(new, dtype=np.float32) + half) - half
    at = np.maximum(at, np.float32(0))
    before = at.astype(np.int32)
    return before, np.minimum(before + 1, count - 1), at - before.astype(np.float32)
