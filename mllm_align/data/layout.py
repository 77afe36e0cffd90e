"""How images become patches, and where their embeddings stand in a prompt.

All of it follows from an image's size, so it is done once on the host; the model only gathers rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mllm_align.batch import Pixels


@dataclass(frozen=True)
class Run:
    """Embeddings that follow each other in the prompt, without text between them.

    rows [r] int32: of the group's image table (see `Prefix`): 0, or 1 + t * I + i for embedding i of
    tile t.
    taps [W, r] int32, mix [W, r] float32: further rows that each embedding is mixed of, and their shares,
    as in `Prefix`; None where each is its row.
    grid: (lines, columns) that they fill line by line, of a layout with three axes of rotary positions.
    block: they see each other, and not only those before them.
    """

    rows: np.ndarray
    taps: np.ndarray | None = None
    mix: np.ndarray | None = None
    grid: tuple[int, int] | None = None
    block: bool = False


class Layout(Protocol):
    """The numbers of a checkpoint that decide how images become tokens.

    mark: what the chat template writes for an image. token: how the tokenizer spells the model's image
    token. tokens: I, rows of the image table that a tile has. taps: W, further rows that an embedding may
    be mixed of. axes: A, of rotary positions. overview: the tiles of an image that show all of it together.
    largest: sizes (height, width) of which one becomes the most
    embeddings, and one the most tiles.

    Sizes are those of the image after EXIF orientation. images: how many the record has, for families that
    treat several otherwise than one. An implementation is hashable and picklable: other processes encode
    with it, and what is counted is kept by it.
    """

    @property
    def mark(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def taps(self) -> int: ...
    @property
    def axes(self) -> int: ...
    @property
    def overview(self) -> slice: ...
    @property
    def largest(self) -> tuple[tuple[int, int], ...]: ...

    def text(self, height: int, width: int, images: int) -> str:
        """What takes the mark's place before the text is tokenized: `token` once for every run, with the
        text that stands around the runs."""
        ...

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        """The embeddings of an image whose tiles begin at number `tile` of the record's."""
        ...

    def grid(self, height: int, width: int, images: int) -> tuple[int, int] | None:
        """(rows, columns) of the tiles that an image is cut into; None where it is not cut."""
        ...

    def tiles(self, height: int, width: int, images: int) -> tuple[int, int]:
        """(T, N) of an image's pixels."""
        ...

    def empty(self) -> Pixels:
        """Of a record without images: T is 0."""
        ...

    def pixels(self, process: Any, image: Image.Image, images: int) -> Pixels:
        """patches [T, N, C] float32 and place [T, N, 2] int16 of an image, from the checkpoint's own image
        processor. Raises ValueError, with the shapes found and wanted, where it makes something else than
        the configuration asks for."""
        ...

    def noise(self, draw: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Any:
        """Noise for patches of shape [..., N, C]: draw(shape) draws independent numbers, on the host or on
        the device, in an order that belongs to the layout."""
        ...


@cache  # of 100,000 images, most share their size with others
def counts(layout: Layout, height: int, width: int, images: int) -> tuple[int, int, int]:
    """(tiles, image tokens in the text, embeddings) of an image of this size."""
    runs = layout.runs(height, width, images, 0)
    return layout.tiles(height, width, images)[0], len(runs), sum(len(run.rows) for run in runs)


def mixed(image: np.ndarray, runs: Sequence[Run], taps: int) -> dict[str, Any]:
    """taps and mix [W, p] of a prompt whose embeddings, where `image` is not -1, are those of the runs;
    empty for a layout without."""
    if not taps:
        return {}
    out = {name: np.zeros((taps, len(image)), dtype) for name, dtype in (("taps", "i4"), ("mix", "f4"))}
    for run, place in zip(runs, _places(image, runs), strict=True):
        if run.taps is not None:
            out["taps"][:, place], out["mix"][:, place] = run.taps, run.mix
    return out


def _places(image: np.ndarray, runs: Sequence[Run]) -> list[np.ndarray]:
    """Where in the prompt each run's embeddings stand."""
    return np.split(np.flatnonzero(image >= 0), np.cumsum([len(run.rows) for run in runs]))[: len(runs)]


def ordered(image: np.ndarray, runs: Sequence[Run]) -> np.ndarray:
    """[p] int32: who sees whom (see `Prefix.order`) in a prompt whose embeddings, where `image` is not -1,
    are those of the runs. Text counts on; the embeddings of a block have the order of its first."""
    out = np.arange(len(image), dtype=np.int32)
    for run, place in zip(runs, _places(image, runs), strict=True):
        if run.block:
            out[place] = place[0]
    return out


def rotary(image: np.ndarray, runs: Sequence[Run], axes: int) -> np.ndarray:
    """[A, p] int32: rotary positions of a prompt whose embeddings, where `image` is not -1, are those of
    the runs.

    Text counts on, on all axes alike. Embeddings of a grid stay at the number they begin with on the first
    axis, and count lines on the second, columns on the third from there; what follows goes on after the
    longer of the two (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    out = np.tile(np.arange(len(image), dtype=np.int32), (axes, 1))
    for run, place in zip(runs, _places(image, runs), strict=True):
        if run.grid is not None:
            first, stop = place[0], place[-1] + 1
            lines, columns = np.divmod(np.arange(len(place), dtype=np.int32), run.grid[1])
            out[:, stop:] += max(run.grid) - len(place)
            out[:, place] = out[0, first] + np.stack([np.zeros_like(lines), lines, columns])
    return out


def cut(tiles: Any, patch: int) -> Any:
    """Tiles [..., h, w, 3] into patches [..., N, patch * patch * 3], line by line.

    Pixels that fill no whole patch are left out, as a strided convolution leaves them out.
    """
    *lead, height, width, channels = tiles.shape
    down, across = height // patch, width // patch
    tiles = tiles[..., : down * patch, : across * patch, :]
    patches = tiles.reshape(*lead, down, patch, across, patch, channels).swapaxes(-4, -3)
    return patches.reshape(*lead, down * across, patch * patch * channels)


def whole_tiles(tiles: np.ndarray, patch: int) -> Pixels:
    """Square tiles [T, size, size, 3] that patches fill line by line."""
    lines = np.indices((tiles.shape[1] // patch,) * 2, np.int16).reshape(2, -1).T
    place = np.broadcast_to(lines, (len(tiles), *lines.shape))
    return Pixels(np.ascontiguousarray(cut(tiles, patch)), np.ascontiguousarray(place))


@dataclass(frozen=True)
class TileLayout:
    """What layouts of square tiles of one size share that patches fill line by line, in which each
    embedding is a row of its tile's.

    size, patch: sides of a tile and of a patch in pixels. tokens: embeddings of a tile. An image that is
    cut has one tile more, that of the whole.
    """

    size: int
    patch: int
    tokens: int
    taps = 0
    axes = 1

    def grid(self, height: int, width: int, images: int = 1) -> tuple[int, int] | None:
        """See `Layout`."""
        raise NotImplementedError

    def tiles(self, height: int, width: int, images: int = 1) -> tuple[int, int]:
        grid = self.grid(height, width)
        return 1 if grid is None else 1 + grid[0] * grid[1], (self.size // self.patch) ** 2

    def empty(self) -> Pixels:
        return whole_tiles(np.zeros((0, self.size, self.size, 3), np.float32), self.patch)

    def tiled(self, made: Any, image: Image.Image) -> Pixels:
        """made: [T, 3, size, size] of the image. Raises ValueError where it has another shape."""
        made = np.asarray(made, np.float32)
        tiles, tile = self.tiles(image.height, image.width)[0], (3, self.size, self.size)
        if made.shape != (tiles, *tile):
            found = f"{len(made)} x {list(made.shape[1:])}"
            raise ValueError(f"it gives pixels {found}, config.json asks for {tiles} x {list(tile)}")
        return whole_tiles(made.transpose(0, 2, 3, 1), self.patch)

    def noise(self, draw: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Any:
        return draw(shape)
