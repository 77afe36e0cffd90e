"""The pictures: size, place and colour of what is drawn, noise, and icons that can be told apart."""

from itertools import combinations

import numpy as np
import pytest

from mllm_align.data.scenes.draw import CELL, picture
from mllm_align.data.scenes.world import COLOURS, KINDS, SIZES, Scene, Settings, Thing, make_scene


def pixels(scene, grain=0.0, seed=0):
    return np.asarray(picture(scene, grain, seed), np.float32)


def one(kind, colour="black", size="large", row=0, column=0, id="one"):
    return Scene(id, 1, 1, ((Thing(kind, colour, size, row, column),),))


def ink(scene):
    """Where the picture differs from its ground."""
    shown = pixels(scene)
    return np.abs(shown - shown[-1, -1]).max(-1) > 60


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
    for index in range(40):
        scene = make_scene("train", index, Settings())
        shown = pixels(scene)
        cells = {(thing.row, thing.column): thing for thing in scene.things}
        free = next(
            (r, c) for r in range(2 * scene.rows) for c in range(2 * scene.columns) if (r, c) not in cells
        )
        ground = shown[free[0] * CELL, free[1] * CELL]
        for row in range(2 * scene.rows):
            for column in range(2 * scene.columns):
                cell = shown[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
                thing = cells.get((row, column))
                if thing is None:
                    assert np.array_equal(cell, np.broadcast_to(ground, cell.shape))
                else:
                    colour = np.array(COLOURS[thing.colour], np.float32)
                    assert (np.abs(cell - colour).max(-1) < 2).sum() >= 8, thing


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
    colours = [*COLOURS.values(), (238, 238, 238)]
    for a, b in combinations(colours, 2):
        assert np.linalg.norm(np.subtract(a, b)) > 120, (a, b)


def test_grain_is_the_deviation_of_the_noise_and_moves_nothing():
    scene = one("cup")
    clean, noisy = pixels(scene), pixels(scene, 10.0)
    dark = clean.max(-1) < 40  # far from both ends of the scale, but for the deepest
    assert np.std((noisy - clean)[dark]) == pytest.approx(10, rel=0.15)
    assert np.abs((noisy - clean)[dark].mean()) < 2
