"""Drawing of scenes: flat icons on a shaded background; fog and noise set how hard they are to see."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mllm_align.testbed.scenes.world import COLOURS, SIDE, Scene, Thing

CELL = 16  # pixels
_SHADE = 0.4  # of the ground's light
_FINE = 4  # icons are drawn this many times larger, then reduced, for smooth edges
# Side in pixels; a thing is centred in its cell.
_SIDES = {"small": 8, "large": 12}

# Icons in the unit square, x to the right and y down. A list of points is a polygon, a pair of corners
# an ellipse; the shapes in `_HOLES` are cut out afterwards.
_Point = tuple[float, float]
_SHAPES: dict[str, list[list[_Point]]] = {
    "moon": [[(0.0, 0.0), (1.0, 1.0)]],
    "star": [
        [
            (0.5 + r * np.sin(turn * np.pi / 5), 0.54 - r * np.cos(turn * np.pi / 5))
            for turn, r in enumerate([0.54, 0.21] * 5)
        ]
    ],
    "house": [[(0, 0.45), (0.5, 0), (1, 0.45), (0.88, 0.45), (0.88, 1), (0.12, 1), (0.12, 0.45)]],
    "tree": [
        [(0.08, 0.0), (0.92, 0.7)],
        [(0.4, 0.6), (0.6, 0.6), (0.6, 1), (0.4, 1)],
    ],
    "cup": [[(0.0, 0.15), (0.72, 0.15), (0.64, 0.9), (0.08, 0.9)], [(0.5, 0.25), (1.0, 0.72)]],
    "spoon": [[(0.28, 0.0), (0.72, 0.5)], [(0.44, 0.4), (0.56, 0.4), (0.56, 1), (0.44, 1)]],
    "key": [
        [(0.0, 0.26), (0.46, 0.74)],
        [
            (0.4, 0.43),
            (1, 0.43),
            (1, 0.78),
            (0.87, 0.78),
            (0.87, 0.57),
            (0.76, 0.57),
            (0.76, 0.72),
            (0.64, 0.72),
            (0.64, 0.57),
            (0.4, 0.57),
        ],
    ],
    "lock": [[(0.2, 0.0), (0.8, 0.8)], [(0.05, 0.42), (0.95, 0.42), (0.95, 1), (0.05, 1)]],
    "fish": [[(0.0, 0.22), (0.74, 0.78)], [(0.6, 0.5), (1, 0.15), (1, 0.85)]],
    "boat": [
        [(0, 0.68), (1, 0.68), (0.8, 1), (0.2, 1)],
        [(0.52, 0), (0.52, 0.62), (0.95, 0.62)],
        [(0.44, 0.15), (0.44, 0.62), (0.1, 0.62)],
    ],
    "hat": [
        [(0, 0.74), (1, 0.74), (1, 0.92), (0, 0.92)],
        [(0.27, 0.08), (0.73, 0.08), (0.73, 0.74), (0.27, 0.74)],
    ],
    "boot": [[(0.15, 0), (0.6, 0), (0.6, 0.55), (1, 0.72), (1, 1), (0.15, 1)]],
    "bell": [
        [(0.22, 0.0), (0.78, 0.6)],
        [(0.22, 0.3), (0.78, 0.3), (0.83, 0.55), (1, 0.72), (0, 0.72), (0.17, 0.55)],
        [(0.36, 0.74), (0.64, 1.0)],
    ],
    "candle": [
        [(0.36, 0.42), (0.64, 0.42), (0.64, 0.86), (0.36, 0.86)],
        [(0.08, 0.84), (0.92, 0.84), (0.92, 1), (0.08, 1)],
        [(0.5, 0), (0.66, 0.24), (0.5, 0.36), (0.34, 0.24)],
    ],
    "heart": [[(0, 0.08), (0.54, 0.6)], [(0.46, 0.08), (1, 0.6)], [(0.04, 0.45), (0.96, 0.45), (0.5, 1)]],
    "arrow": [[(1, 0), (1, 0.62), (0.38, 0)], [(0.62, 0.22), (0.78, 0.38), (0.16, 1), (0, 0.84)]],
}
_HOLES: dict[str, list[list[_Point]]] = {
    "moon": [[(0.3, -0.1), (1.2, 0.8)]],
    "house": [[(0.4, 0.65), (0.6, 0.65), (0.6, 1), (0.4, 1)]],
    "cup": [[(0.66, 0.36), (0.88, 0.6)]],
    "key": [[(0.13, 0.4), (0.33, 0.6)]],
    "lock": [[(0.36, 0.16), (0.64, 0.5)]],
}


def picture(scene: Scene, grain: float, seed: int = 0, fog: float = 0.0) -> Image.Image:
    """Return the RGB picture of a scene, 32 pixels per region; deterministic in its arguments.

    grain: standard deviation of the pixel noise on a scale of 0 to 255. fog: maximum transparency of a
    thing; each thing has its own, from 0 to `fog`.
    """
    rng = np.random.default_rng([seed, zlib.crc32(scene.id.encode())])
    side = SIDE * CELL
    ground = _ground(scene.rows * side, scene.columns * side)
    pixels = ground + rng.uniform(-6, 6, size=3).astype(np.float32)
    for group in scene.groups:
        if len(group) == 2:
            _frame(pixels, group)
    for thing in scene.things:
        stencil = _stencil(thing.kind, thing.size)
        top, left = (at * CELL + (CELL - len(stencil)) // 2 for at in (thing.row, thing.column))
        place = pixels[top : top + len(stencil), left : left + len(stencil)]
        opacity = 1 - fog * np.float32(rng.random())
        inside, edge = stencil[..., :1], stencil[..., 1:]
        ink = (1 - edge) * np.array(COLOURS[thing.colour], np.float32)
        place += opacity * inside * (ink - place)
    pixels += grain * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _frame(pixels: np.ndarray, group: Sequence[Thing]) -> None:
    """Darken a line around the two cells of a pair, one pixel wide, which no thing covers.

    A patch of one cell therefore shows on which side of it the other thing of the pair is.
    """
    first, second = group  # in raster order
    rows = slice(first.row * CELL, (second.row + 1) * CELL)
    columns = slice(first.column * CELL, (second.column + 1) * CELL)
    inside = pixels[rows, columns]
    line = np.ones(inside.shape[:2], bool)
    line[1:-1, 1:-1] = False
    inside[line] *= _SHADE


@cache
def _ground(height: int, width: int) -> np.ndarray:
    """Return the background [height, width, 3]: sky above, grass below, warm light from the left.

    A patch of background therefore indicates its position, as it mostly does in photographs. The vertical
    and horizontal colour gradients are orthogonal, and small enough to keep the things' colours distinct.
    """
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    sky, grass, warm, cool = (
        np.array(colour, np.float32)
        for colour in ((203, 196, 281), (201, 255, 132), (46, -2, -28), (-116, -2, -29))
    )
    return sky + down * (grass - sky) + warm + across * (cool - warm)


@cache
def _stencil(kind: str, size: str) -> np.ndarray:
    """Return the coverage of each pixel by the icon, and the share of it that is black edge.

    [side, side, 2] float32 from 0 to 1.
    """
    fine = _SIDES[size] * _FINE
    mask = Image.new("L", (fine, fine), 0)
    pen = ImageDraw.Draw(mask)
    for shapes, ink in ((_SHAPES, 255), (_HOLES, 0)):
        for points in shapes.get(kind, []):
            stroke = pen.ellipse if len(points) == 2 else pen.polygon
            stroke([(x * (fine - 1), y * (fine - 1)) for x, y in points], fill=ink)
    core = mask.filter(ImageFilter.MinFilter(2 * _FINE - 1))
    inside, inner = (np.asarray(one.reduce(_FINE), np.float32) / 255 for one in (mask, core))
    return np.stack([inside, 1 - inner / np.maximum(inside, 1e-6)], -1)
