"""InternVL's images: a grid of tiles of about the image's shape, then the whole image as one tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run, whole_tiles


@dataclass(frozen=True)
class InternVLLayout:
    """size, patch: sides of a tile and of a patch in pixels. tokens: embeddings of a tile. fewest, most:
    tiles that an image is cut into, beside the whole image. begin, end: what stands around all embeddings
    of an image.
    """

    size: int
    patch: int
    tokens: int
    fewest: int = 1
    most: int = 12
    token: str = "<IMG_CONTEXT>"
    begin: str = "<img>"
    end: str = "</img>"
    taps = 0
    axes = 1
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

    def tiles(self, height: int, width: int, images: int = 1) -> tuple[int, int]:
        grid = self.grid(height, width)
        return 1 if grid is None else 1 + grid[0] * grid[1], (self.size // self.patch) ** 2

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        count, _ = self.tiles(height, width)
        return [Run(1 + np.arange(tile * self.tokens, (tile + count) * self.tokens, dtype=np.int32))]

    def empty(self) -> Pixels:
        return whole_tiles(np.zeros((0, self.size, self.size, 3), np.float32), self.patch)

    def pixels(self, process: Any, image: Image.Image, images: int = 1) -> Pixels:
        # transformers' joint processor cuts whatever the image processor's own `crop_to_patches` says
        made = process([image], crop_to_patches=True, return_tensors="np")["pixel_values"]
        made = np.asarray(made, np.float32)
        tiles, tile = self.tiles(image.height, image.width)[0], (3, self.size, self.size)
        if made.shape != (tiles, *tile):
            found = f"{len(made)} x {list(made.shape[1:])}"
            raise ValueError(f"it gives pixels {found}, config.json asks for {tiles} x {list(tile)}")
        return whole_tiles(made.transpose(0, 2, 3, 1), self.patch)

    def noise(self, draw: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Any:
        return draw(shape)


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
