"""Gemma 3's images: each is one square tile, whatever its shape, and a block that sees itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run, TileLayout, whole_tiles


@dataclass(frozen=True)
class Gemma3Layout(TileLayout):
    """begin, end: what stands around a tile's embeddings; the template writes `begin` alone."""

    token: str = "<image_soft_token>"
    begin: str = "<start_of_image>"
    end: str = "<end_of_image>"
    overview = slice(None)

    @property
    def mark(self) -> str:
        return self.begin

    @property
    def largest(self) -> tuple[tuple[int, int], ...]:
        return ((self.size, self.size),)

    def text(self, height: int, width: int, images: int) -> str:
        return f"\n\n{self.begin}{self.token}{self.end}\n\n"

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        first = 1 + tile * self.tokens
        return [Run(np.arange(first, first + self.tokens, dtype=np.int32), block=True)]

    def grid(self, height: int, width: int, images: int = 1) -> None:
        return None

    def pixels(self, process: Any, image: Image.Image, images: int = 1) -> Pixels:
        made = np.asarray(process([[image]], return_tensors="np")["pixel_values"], np.float32)
        if made.shape != (wanted := (1, 3, self.size, self.size)):
            raise ValueError(f"it gives pixels {list(made.shape)}, config.json asks for {list(wanted)}")
        return whole_tiles(made.transpose(0, 2, 3, 1), self.patch)
