"""InternVL's images: a grid of tiles of about the image's shape, then the whole image as one tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run, TileLayout


@dataclass(frozen=True)
class InternVLLayout(TileLayout):
    """fewest, most: tiles that an image is cut into, beside the whole image. begin, end: what stands around
    all embeddings of an image.
    """

    fewest: int = 1
    most: int = 12
    token: str = "<IMG_CONTEXT>"
    begin: str = "<img>"
    end: str = "</img>"
    overview = slice(-1, None)

    @property
    def mark(self) -> str:
        return self.token

    @property
    def largest(self) -> tuple[tuple[int, int], ...]:
        rows, columns = grids(self.fewest, self.most)[-1]
        return ((rows * self.size, columns * self.size),)

    def text(self, height: int, width: int, images: int) -> str:
        return f"{self.begin}{self.token}{self.end}"

    def grid(self, height: int, width: int, images: int = 1) -> tuple[int, int] | None:
        grid = best_grid(height, width, self.size, grids(self.fewest, self.most))
        return None if grid == (1, 1) else grid

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        count, _ = self.tiles(height, width)
        return [Run(1 + np.arange(tile * self.tokens, (tile + count) * self.tokens, dtype=np.int32))]

    def pixels(self, process: Any, image: Image.Image, images: int = 1) -> Pixels:
        # transformers' joint processor cuts whatever the image processor's own `crop_to_patches` says
        made = process([image], crop_to_patches=True, return_tensors="np")["pixel_values"]
        return self.tiled(made, image)


@cache
def grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of all grids of so many tiles: those of fewer tiles first, then those of fewer
    columns."""
    counts = range(1, most + 1)
    found = [(rows, columns) for columns in counts for rows in counts if fewest <= rows * columns <= most]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def best_grid(height: int, width: int, tile: int, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid whose ratio of sides is nearest to the image's.

    Of several that are as near, the one of most tiles that the image fills by more than half, counted in
    pixels; else the first. Ratios are float64, as the image processor's are.
    """

    def apart(grid: tuple[int, int]) -> float:
        return abs(width / height - grid[1] / grid[0])

    least = min(map(apart, grids))
    first, *others = (grid for grid in grids if apart(grid) == least)
    filled = [grid for grid in others if width * height > 0.5 * tile * tile * grid[1] * grid[0]]
    return (filled or [first])[-1]
