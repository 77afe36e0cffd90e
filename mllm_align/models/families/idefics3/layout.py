"""Idefics3's images: rows and columns of tiles, each after its name, then the whole image as one tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run, TileLayout


@dataclass(frozen=True)
class Idefics3Layout(TileLayout):
    """longest: pixels of an image's longer side when it is cut. split: whether it is; else it is one tile.
    fence, whole: what stands around a tile's embeddings, and before those of the whole image.
    """

    longest: int
    split: bool = True
    token: str = "<image>"
    fence: str = "<fake_token_around_image>"
    whole: str = "<global-img>"
    overview = slice(-1, None)

    @property
    def mark(self) -> str:
        return self.token

    @property
    def largest(self) -> tuple[tuple[int, int], ...]:
        return ((self.longest, self.longest),)

    def text(self, height: int, width: int, images: int) -> str:
        whole = f"{self.fence}{self.whole}{self.token}{self.fence}"
        if (grid := self.grid(height, width)) is None:
            return whole
        rows, columns = (range(1, 1 + count) for count in grid)
        lines = [[f"{self.fence}<row_{r}_col_{c}>{self.token}" for c in columns] for r in rows]
        return "".join("".join(line) + "\n" for line in lines) + "\n" + whole

    def grid(self, height: int, width: int, images: int = 1) -> tuple[int, int] | None:
        if not self.split:
            return None
        height, width = canvas(height, width, self.longest, self.size)
        if max(height, width) <= self.size:
            return None
        return height // self.size, width // self.size

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        """Each tile has text before it."""
        count, _ = self.tiles(height, width, images)
        rows = 1 + np.arange(tile * self.tokens, (tile + count) * self.tokens, dtype=np.int32)
        return [Run(each) for each in rows.reshape(count, -1)]

    def pixels(self, process: Any, image: Image.Image, images: int = 1) -> Pixels:
        return self.tiled(process([[image]], return_tensors="np")["pixel_values"][0], image)


def canvas(height: int, width: int, longest: int, tile: int) -> tuple[int, int]:
    """(height, width) of an image when it is cut.

    First its longer side becomes `longest` and the other one even, then both become multiples of a tile.
    The ratio of the sides is a float64 and products are cut off, as the image processors do it: an image
    whose exact shape would fill a line of tiles may get one more or less.
    """
    tall, ratio = height > width, width / height
    short = int(longest * ratio) if tall else int(longest / ratio)
    short = max(short + short % 2, 1)
    height, width = (longest, short) if tall else (short, longest)
    tall, ratio = height > width, width / height
    long = math.ceil(max(height, width) / tile) * tile
    short = math.ceil(int(long * ratio if tall else long / ratio) / tile) * tile
    return (long, short) if tall else (short, long)
