"""The pictures: size, place and colour of what is drawn, noise, and icons that can be told apart."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from mllm_align.testbed.scenes.draw import CELL, picture
from mllm_align.testbed.scenes.world import (
    COLOURS,
    GRIDS,
    KINDS,
    LESSONS,
    SIZES,
    Scene,
    Settings,
    Thing,
    make_scene,
)


def pixels(scene, grain=0.0, seed=0):
    return np.asarray(picture(scene, grain, seed), np.float32)


def one(kind, colour="black", size="large", row=0, column=0, id="one"):
    return Scene(id, 1, 1, ((Thing(kind, colour, size, row, column),),))


def ink(scene):
    """Where the picture differs from its ground."""
    return np.abs(pixels(scene) - pixels(replace(scene, groups=()))).max(-1) > 60


@pytest.mark.parametrize("index", range(6))
def test_picture_is_as_large_as_its_regions(index):
    scene = make_scene("train", index, Settings())
    image = picture(scene, 40)
    assert (image.mode, image.size) == ("RGB", (scene.columns * 2 * CELL, scene.rows * 2 * CELL))


def test_same_arguments_same_picture():
    scene = make_scene("train", 3, Settings())
    assert np.array_equal(pixels(scene, 40), pixels(scene, 40))
    assert not np.array_equal(pixels(scene, 40), pixels(scene, 40, seed=1))
    assert not np.array_equal(pixels(one("cup", id="one")), pixels(one("cup", id="two")))


def test_every_thing_and_nothing_else_stands_in_its_cell():
    scenes = [make_scene("train", i, Settings()) for i in range(40)]
    for scene in scenes + [make_scene(lesson, i, Settings()) for lesson in LESSONS for i in range(5)]:
        shown, ground = pixels(scene), pixels(replace(scene, groups=()))
        cells = {(thing.row, thing.column): thing for thing in scene.things}
        for row in range(2 * scene.rows):
            for column in range(2 * scene.columns):
                where = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                thing = cells.get((row, column))
                if thing is None:
                    assert np.array_equal(shown[where], ground[where])
                else:
                    colour = np.array(COLOURS[thing.colour], np.float32)
                    within = shown[where][1:-1, 1:-1]  # of the frame of its pair
                    assert (np.abs(within - colour).max(-1) < 90).any(), thing
                    assert within.max(-1).min() < 120, thing  # its black edge


@pytest.mark.parametrize(("size", "margin"), [("small", 4), ("large", 2)])
def test_things_stand_in_the_middle_of_their_cell(size, margin):
    for kind in KINDS:
        inked = ink(one(kind, size=size, row=1, column=0))
        assert not inked[: CELL + margin].any() and not inked[2 * CELL - margin :].any()
        assert not inked[:, :margin].any() and not inked[:, CELL - margin :].any()


@pytest.mark.parametrize("second", [(0, 1), (1, 0)])
def test_a_frame_encloses_both_cells_of_a_pair(second):
    pair = Thing("cup", "red", "large", 0, 0), Thing("key", "red", "large", *second)
    scene = Scene("pair", 1, 1, (pair,))
    darker = (pixels(scene) < 0.5 * pixels(replace(scene, groups=((pair[0],), (pair[1],))))).all(-1)
    expected = np.zeros(darker.shape, bool)
    expected[: (1 + second[0]) * CELL, : (1 + second[1]) * CELL] = True
    expected[1 : (1 + second[0]) * CELL - 1, 1 : (1 + second[1]) * CELL - 1] = False
    assert np.array_equal(darker, expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_ground_tells_where_in_the_picture_it_is(grid):
    """Cells differ by far more than the noise leaves in their mean: at grain 40, 40 / 16 = 2.5."""
    ground = pixels(Scene("empty", *grid, ()))
    height, width = 2 * grid[0], 2 * grid[1]
    cells = ground.reshape(height, CELL, width, CELL, 3).mean((1, 3))
    for a, b in combinations(cells.reshape(-1, 3), 2):
        assert np.linalg.norm(a - b) > 8
    red, green, blue = np.moveaxis(cells, -1, 0)
    assert (np.diff(red - blue, axis=1) < 0).all()  # warm light from the left
    assert (np.diff(green - blue, axis=0) > 0).all()  # sky above, grass below
    assert np.abs(np.diff(ground, axis=0)).max() < 8 and np.abs(np.diff(ground, axis=1)).max() < 8


def test_fog_lets_each_thing_through_by_a_share_of_its_own():
    things = make_scene("everywhere", 0, Settings()).things
    things = tuple(replace(thing, kind="house", colour="black", size="large") for thing in things)
    scene = Scene("fog", 1 + things[-1].row // 2, 1 + things[-1].column // 2, (things,))
    clear, ground = pixels(scene), pixels(replace(scene, groups=()))
    foggy = np.asarray(picture(scene, 0.0, fog=0.4), np.float32)
    assert np.array_equal(foggy[clear == ground], ground[clear == ground])
    inside = np.abs(clear - COLOURS["black"]).max(-1) == 0  # covered wholly
    shares = []
    for thing in things:
        top, left = thing.row * CELL, thing.column * CELL
        cell = np.s_[top : top + CELL, left : left + CELL]
        here = inside[cell]
        share = (foggy - clear)[cell][here] / (ground - clear)[cell][here]
        assert np.ptp(share) < 0.02  # a whole level of 255 at most, over a contrast of 150 and more
        shares.append(share.mean())
    assert -0.01 < min(shares) < 0.15 and 0.25 < max(shares) < 0.41
    noisy, plain = (np.asarray(picture(scene, 5.0, fog=fog), np.float32) for fog in (0.4, 0.0))
    off = np.abs((noisy - foggy) - (plain - clear))
    assert off[clear > 25].max() <= 1  # the noise is the same, but where black cuts it off


def test_large_things_have_about_twice_the_ink_of_small_ones():
    for kind in KINDS:
        small, large = (ink(one(kind, size=size)).sum() for size in SIZES)
        assert 1.5 < large / small < 2.6, kind


def test_icons_can_be_told_apart():
    def shape(kind, size):
        where = np.argwhere(ink(one(kind, size=size, id="same")))
        return {tuple(point) for point in where}

    for size in SIZES:
        shapes = {kind: shape(kind, size) for kind in KINDS}
        for a, b in combinations(KINDS, 2):
            overlap = len(shapes[a] & shapes[b]) / len(shapes[a] | shapes[b])
            assert overlap < 0.8, (a, b, size, overlap)


def test_colours_are_far_apart_from_each_other_and_the_ground():
    for a, b in combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 120, (a, b)
    ground = pixels(Scene("empty", 2, 2, ()))
    for colour in COLOURS.values():
        assert np.linalg.norm(ground - np.array(colour, np.float32), axis=-1).min() > 110, colour


def test_grain_is_the_deviation_of_the_noise_and_moves_nothing():
    scene = one("cup")
    clean, noisy = pixels(scene), pixels(scene, 10.0)
    dark = clean.max(-1) < 40  # far from both ends of the scale, but for the deepest
    assert np.std((noisy - clean)[dark]) == pytest.approx(10, rel=0.15)
    assert np.abs((noisy - clean)[dark].mean()) < 2
