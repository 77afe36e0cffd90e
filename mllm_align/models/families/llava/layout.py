"""LLaVA's images: one square tile (1.5), or AnyRes tiles, unpadding and newlines (1.6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run, cut, whole_tiles


@dataclass(frozen=True)
class LlavaLayout:
    """size: side of a tile in pixels; patch: of a patch. class_token: the tower's class token is kept as
    one more embedding. pinpoints: AnyRes canvas sizes (height, width) in pixels; empty for LLaVA 1.5.
    """

    size: int
    patch: int
    class_token: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ()
    token: str = "<image>"
    taps = 0
    axes = 1
    overview = slice(1)

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        return self.side**2 + self.class_token

    @property
    def mark(self) -> str:
        return self.token

    @property
    def largest(self) -> tuple[tuple[int, int], ...]:
        return self.pinpoints or ((self.size, self.size),)  # at a canvas's own size nothing is cut

    def text(self, height: int, width: int, images: int) -> str:
        return self.token

    def grid(self, height: int, width: int, images: int = 1) -> tuple[int, int] | None:
        if not self.pinpoints:
            return None
        best = best_canvas(height, width, self.pinpoints)
        return best[0] // self.size, best[1] // self.size

    def tiles(self, height: int, width: int, images: int = 1) -> tuple[int, int]:
        grid = self.grid(height, width, images)
        return 1 if grid is None else 1 + grid[0] * grid[1], self.side**2

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        return [Run(self.rows(height, width, tile))]

    def rows(self, height: int, width: int, tile: int) -> np.ndarray:
        """Rows of the image table in the order of the prompt.

        LLaVA 1.6: the base tile, then the tiles joined to one picture, padding rows and columns cut off
        as the original image's shape says, one newline (row 0) at the end of each line.
        """
        start = 1 + tile * self.tokens
        base = np.arange(start, start + self.tokens, dtype=np.int32)
        grid = self.grid(height, width)
        if grid is None:
            return base
        picture = unpad(joined(start + self.tokens, grid, self.side), height, width)
        lines = np.concatenate([picture, np.zeros((len(picture), 1), np.int32)], axis=1)
        return np.concatenate([base, lines.reshape(-1)])

    def empty(self) -> Pixels:
        return self.patched(np.zeros((0, self.size, self.size, 3), np.float32))

    def pixels(self, process: Any, image: Image.Image, images: int = 1) -> Pixels:
        made = process([image], return_tensors="np")["pixel_values"][0]
        return self.checked(made, self.tiles(image.height, image.width, images)[0])

    def checked(self, made: Any, tiles: int) -> Pixels:
        """The pixels that an image processor made of an image, [T, 3, size, size] or one tile's. Raises
        ValueError as `pixels`."""
        made, tile = np.asarray(made, np.float32), (3, self.size, self.size)
        made = made[None] if made.ndim == 3 else made
        if made.shape != (tiles, *tile):
            found = f"{len(made)} x {list(made.shape[1:])}"
            raise ValueError(f"it gives pixels {found}, config.json asks for {tiles} x {list(tile)}")
        return self.patched(made.transpose(0, 2, 3, 1))

    def noise(self, draw: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Any:
        """Drawn line by line over whole tiles, and cut into patches as they are."""
        return cut(draw((*shape[:-2], self.size, self.size, 3)), self.patch)

    def patched(self, tiles: np.ndarray) -> Pixels:
        """tiles: [T, size, size, 3]."""
        return whole_tiles(tiles, self.patch)


def best_canvas(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas that keeps most of the image's pixels, and wastes least among those.

    Figures are truncated to whole pixels as in LLaVA's reference code, on which checkpoints were trained.
    """

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(pinpoints, key=rank)  # the first of equals


def joined(start: int, grid: tuple[int, int], side: int) -> np.ndarray:
    """Rows of the image table as the tiles show them side by side, [down * side, across * side]; those of
    the first tile begin at `start`."""
    down, across = grid
    tiles = start + np.arange(down * across * side * side, dtype=np.int32)
    picture = tiles.reshape(down, across, side, side).swapaxes(1, 2)
    return picture.reshape(down * side, across * side)


def unpad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut the rows or columns that an image of this shape did not fill when it was fitted centred."""
    rows, columns = picture.shape
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return picture[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return picture[:, cut : columns - cut]
