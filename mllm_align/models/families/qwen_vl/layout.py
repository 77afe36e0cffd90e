"""Images of Qwen2.5-VL and Qwen3-VL: one grid of patches each, of about the image's own size and shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run

SHARPEST = 200  # the longer side in times of the shorter one


@dataclass(frozen=True)
class QwenLayout:
    """patch: side of a patch in pixels. merge: side of a cell in patches; a tile is one cell, which becomes
    one embedding. frames: copies of an image that the image processor makes. fewest, most: pixels of a
    resized image. window: side, in cells, of the squares that the tower takes an image in; 0: line by line.
    """

    patch: int
    merge: int
    frames: int
    fewest: int
    most: int
    token: str = "<|image_pad|>"
    window: int = 0
    taps = 0
    axes = 3
    overview = slice(None)
    tokens = 1

    @property
    def mark(self) -> str:
        return self.token

    @property
    def largest(self) -> tuple[tuple[int, int], ...]:
        """The most cells that fill a rectangle which is not too long, as square as can be; and a line that
        is as long as can be, where few pixels are allowed."""
        unit = self.patch * self.merge
        for cells in range(self.most // unit**2, 0, -1):
            down = next(n for n in range(math.isqrt(cells), 0, -1) if cells % n == 0)
            if cells <= SHARPEST * down**2:
                return (unit * down, unit * cells // down), (self.most, SHARPEST * self.most)
        return ((unit, unit),)

    def text(self, height: int, width: int, images: int) -> str:
        return self.token

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in whole cells, of the same shape as near as can be.

        Raises ValueError for an image that is too long for the image processor.
        """
        ratio = max(height, width) / min(height, width)
        if ratio > SHARPEST:
            raise ValueError(f"one side is {ratio:.0f} times the other, {SHARPEST} times at most")
        unit = self.patch * self.merge
        down, across = (round(side / unit) * unit for side in (height, width))
        if down * across > self.most:
            by = math.sqrt(height * width / self.most)
            return tuple(max(unit, math.floor(side / by / unit) * unit) for side in (height, width))  # type: ignore
        if down * across < self.fewest:
            by = math.sqrt(self.fewest / (height * width))
            return tuple(math.ceil(side * by / unit) * unit for side in (height, width))  # type: ignore
        return down, across

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """(lines, columns) of cells."""
        down, across = self.resized(height, width)
        return down // (self.patch * self.merge), across // (self.patch * self.merge)

    def grid(self, height: int, width: int, images: int = 1) -> tuple[int, int] | None:
        return None

    def tiles(self, height: int, width: int, images: int = 1) -> tuple[int, int]:
        down, across = self.cells(height, width)
        return down * across, self.merge**2

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        cells = self.cells(height, width)
        rows = 1 + tile + np.argsort(self.order(*cells)).astype(np.int32)
        return [Run(rows, grid=cells)]

    def order(self, down: int, across: int) -> np.ndarray:
        """Numbers, counted line by line, of an image's cells in the tower's order: window by window, those
        at the right and at the bottom as large as the image leaves them (arXiv 2502.13923, section 2.1.1).
        """
        cells = np.arange(down * across)
        if not self.window:
            return cells
        row, column = np.divmod(cells, across)
        return np.lexsort((cells, column // self.window, row // self.window))

    def empty(self) -> Pixels:
        return Pixels(
            np.zeros((0, self.merge**2, 3 * self.patch**2), np.float32),
            np.zeros((0, self.merge**2, 2), np.int16),
        )

    def pixels(self, process: Any, image: Image.Image, images: int = 1) -> Pixels:
        made = process(images=[image], return_tensors="np")
        down, across = self.cells(image.height, image.width)
        grid, wanted = (
            np.asarray(made["image_grid_thw"])[0].tolist(),
            [1, *(self.merge * n for n in (down, across))],
        )
        if grid != wanted:
            raise ValueError(f"it gives {grid} patches, config.json asks for {wanted}")
        return self.patched(made["pixel_values"], down, across)

    def patched(self, patches: Any, down: int, across: int) -> Pixels:
        """patches: [N, 3 * frames * patch * patch] of the image processor, for so many lines and columns of
        cells. The frames of an image are copies: one is kept."""
        patches = np.asarray(patches, np.float32)
        width = 3 * self.frames * self.patch**2
        count = down * across * self.merge**2
        if patches.shape != (count, width):
            raise ValueError(
                f"it gives patches {list(patches.shape)}, config.json asks for {[count, width]}"
            )
        once = patches.reshape(-1, 3, self.frames, self.patch**2)[:, :, 0]
        lines = np.indices((self.merge * down, self.merge * across), np.int16)
        lines = lines.reshape(2, down, self.merge, across, self.merge).transpose(1, 3, 2, 4, 0)
        tiles, order = (down * across, self.merge**2), self.order(down, across)
        return Pixels(once.reshape(*tiles, -1)[order], lines.reshape(*tiles, 2)[order])

    def noise(self, draw: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Any:
        return draw(shape)
