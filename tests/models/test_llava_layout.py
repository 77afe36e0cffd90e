"""Image layout against loops over single embeddings, and against transformers' own counts."""

import jax
import numpy as np
import pytest
from goldens import goldens
from transformers import LlavaNextProcessor

from mllm_align.models.families.llava.layout import LlavaLayout, best_canvas, unpad

SIDE, PATCHES = 336, 4
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
LAYOUT = LlavaLayout(SIDE, SIDE // PATCHES, pinpoints=PINPOINTS)
SIZES = [
    (336, 336),
    (1, 1),
    (1, 5000),
    (5000, 1),
    (3, 4000),
    (100, 1000),
    (1000, 100),
    (333, 500),
    (500, 333),
    (672, 672),
    (2000, 3000),
    (480, 640),
    (337, 671),
    *map(tuple, np.random.default_rng(0).integers(1, 1500, (60, 2)).tolist()),
]


def canvas_by_hand(height, width):
    best, most, least = None, -1, None
    for down, across in PINPOINTS:
        scale = min(across / width, down / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = down * across - kept
        if kept > most or (kept == most and waste < least):
            best, most, least = (down, across), kept, waste
    return best


def margins_by_hand(rows, columns, height, width):
    """Lines that carry no picture, (above and below, left and right), half of the padding each."""
    above = left = 0
    if width * rows > height * columns:  # wider than the canvas: it fills the columns
        while rows - 2 * (above + 1) >= int(round(height * (columns / width), 7)):
            above += 1
    else:
        while columns - 2 * (left + 1) >= int(round(width * (rows / height), 7)):
            left += 1
    return above, left


def rows_by_hand(height, width, first_tile):
    down, across = (x // SIDE for x in canvas_by_hand(height, width))
    above, left = margins_by_hand(down * PATCHES, across * PATCHES, height, width)

    def row(tile, y, x):
        return 1 + (first_tile + tile) * PATCHES**2 + y * PATCHES + x

    found = [row(0, y, x) for y in range(PATCHES) for x in range(PATCHES)]
    for y in range(above, down * PATCHES - above):
        for x in range(left, across * PATCHES - left):
            tile = 1 + (y // PATCHES) * across + x // PATCHES
            found.append(row(tile, y % PATCHES, x % PATCHES))
        found.append(0)
    return found


@pytest.mark.parametrize("height, width", SIZES)
def test_rows_equal_loops_over_single_embeddings(height, width):
    canvas = best_canvas(height, width, PINPOINTS)
    assert canvas == canvas_by_hand(height, width)
    down, across = (x // SIDE for x in canvas)
    assert LAYOUT.grid(height, width) == (down, across)
    assert LAYOUT.tiles(height, width) == (1 + down * across, PATCHES**2)
    for first_tile in (0, 3):
        found = LAYOUT.rows(height, width, first_tile)
        assert found.dtype == np.int32
        assert found.tolist() == rows_by_hand(height, width, first_tile)


@pytest.mark.parametrize("height, width", SIZES)
def test_unpad_cuts_both_sides_alike(height, width):
    picture = np.arange(6 * 8).reshape(6, 8)
    above, left = margins_by_hand(6, 8, height, width)
    assert np.array_equal(unpad(picture, height, width), picture[above : 6 - above, left : 8 - left])


def test_llava_15_has_one_tile_and_no_newline():
    layout = LlavaLayout(SIDE, SIDE // PATCHES)
    assert layout.grid(100, 900) is None and layout.tiles(100, 900) == (1, PATCHES**2)
    assert layout.rows(100, 900, 2).tolist() == list(range(33, 49))


def test_a_kept_class_token_is_one_more_embedding_of_a_tile():
    layout = LlavaLayout(SIDE, SIDE // PATCHES, class_token=True)
    assert layout.rows(10, 10, 1).tolist() == list(range(18, 35))


def test_as_many_tokens_as_transformers_counts():
    golden = goldens("llavanext")
    processor, vision = LlavaNextProcessor.from_pretrained(golden.folder.path), golden.config.vision
    for side, patch in ((vision.image_size, vision.patch_size), (336, 14)):
        pinpoints = [[side * h, side * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
        processor.image_processor.image_grid_pinpoints = pinpoints
        processor.patch_size = patch
        patches = side // patch
        layout = LlavaLayout(side, side // patches, pinpoints=tuple(map(tuple, pinpoints)))
        for height, width in SIZES:
            # transformers counts the class token too, and takes it off in its caller
            theirs = processor._get_number_of_features(height, width, side, side)
            assert len(layout.rows(height, width, 0)) == theirs - 1, (height, width)


def test_patches_hold_the_pixels_of_their_place():
    """Of 23 pixels a side, 3 fill no patch of 10."""
    layout = LlavaLayout(23, 10)
    tiles = np.random.default_rng(0).standard_normal((2, 23, 23, 3)).astype(np.float32)
    patches, place = layout.patched(tiles)
    assert patches.shape == (2, 4, 300) and place.shape == (2, 4, 2) and place.dtype == np.int16
    for tile in range(2):
        for n in range(4):
            row, column = place[tile, n]
            assert (row, column) == divmod(n, 2)
            seen = tiles[tile, 10 * row : 10 * row + 10, 10 * column : 10 * column + 10]
            assert np.array_equal(patches[tile, n], seen.reshape(-1))
    assert [x.shape for x in layout.empty()] == [(0, 4, 300), (0, 4, 2)]


def test_noise_is_drawn_line_by_line_over_whole_tiles():
    layout = LlavaLayout(23, 10)
    noise = layout.noise(np.random.default_rng(1).standard_normal, (2, 4, 300))
    drawn = np.random.default_rng(1).standard_normal((2, 23, 23, 3))
    assert np.array_equal(noise, layout.patched(drawn).patches)
    key = jax.random.key(0)
    noise = jax.jit(lambda: layout.noise(lambda shape: jax.random.normal(key, shape), (4, 300)))()
    drawn = np.asarray(jax.random.normal(key, (1, 23, 23, 3)))
    assert np.array_equal(noise, layout.patched(drawn).patches[0])
