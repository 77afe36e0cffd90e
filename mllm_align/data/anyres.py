"""Where each embedding of an image stands in the prompt: AnyRes tiles, unpadding, newlines.

All of it follows from an image's size, so it is done once on the host; the model only gathers rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class ImageLayout:
    """The numbers of a checkpoint that decide how an image becomes tokens.

    image_size: side of a tile in pixels. side: patches along it. tokens: embeddings of a tile.
    pinpoints: AnyRes canvas sizes (height, width) in pixels; empty for LLaVA 1.5.
    """

    image_size: int
    side: int
    tokens: int
    pinpoints: tuple[tuple[int, int], ...] = ()

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        """(rows, columns) of AnyRes tiles for an image of this size; None for LLaVA 1.5."""
        if not self.pinpoints:
            return None
        best = best_canvas(height, width, self.pinpoints)
        return best[0] // self.image_size, best[1] // self.image_size

    def tiles(self, height: int, width: int) -> int:
        grid = self.grid(height, width)
        return 1 if grid is None else 1 + grid[0] * grid[1]

    def count(self, height: int, width: int) -> int:
        """How many embeddings an image of this size becomes."""
        return _count(self, height, width)

    def rows(self, height: int, width: int, first_tile: int) -> np.ndarray:
        """Rows of the group's image table (see `PromptGroup.prefix_image`) in the order of the prompt.

        LLaVA 1.6: the base tile, then the tiles joined to one picture, padding rows and columns cut off
        as the original image's shape says, one newline (row 0) at the end of each line.
        """
        start = 1 + first_tile * self.tokens
        base = np.arange(start, start + self.tokens, dtype=np.int32)
        grid = self.grid(height, width)
        if grid is None:
            return base
        down, across, side = *grid, self.side
        tiles = start + self.tokens + np.arange(down * across * side * side, dtype=np.int32)
        picture = tiles.reshape(down, across, side, side).swapaxes(1, 2)
        picture = unpad(picture.reshape(down * side, across * side), height, width)
        lines = np.concatenate([picture, np.zeros((len(picture), 1), np.int32)], axis=1)
        return np.concatenate([base, lines.reshape(-1)])


@cache  # of 100,000 images, most share their size with others
def _count(layout: ImageLayout, height: int, width: int) -> int:
    return len(layout.rows(height, width, 0))


def best_canvas(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas that keeps most of the image's pixels, and wastes least among those.

    Figures are truncated to whole pixels as in LLaVA's reference code, on which checkpoints were trained.
    """

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(pinpoints, key=rank)  # the first of equals


def unpad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut the rows or columns that an image of this shape did not fill when it was fitted centred."""
    rows, columns = picture.shape
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return picture[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return picture[:, cut : columns - cut]
