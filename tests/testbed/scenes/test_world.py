"""The world's laws: what may stand where, how often partners meet, and that nothing depends on order."""

from collections import Counter
from itertools import pairwise, product

import pytest

from mllm_align.errors import InputError
from mllm_align.testbed.scenes.world import (
    COLOURS,
    COUPLES,
    GRIDS,
    KINDS,
    LESSONS,
    SIDE,
    SIZES,
    SPLITS,
    Scene,
    Settings,
    make_scene,
    partner,
)

COUNT = 1500
MIXED = tuple(split for split in SPLITS if split not in LESSONS)
SETTINGS = Settings(bias=0.8)


@pytest.fixture(scope="module")
def scenes():
    return {split: [make_scene(split, i, SETTINGS) for i in range(COUNT)] for split in SPLITS}


def pairs(scenes):
    return [group for scene in scenes for group in scene.groups if len(group) == 2]


def test_kinds_come_in_couples():
    assert len(KINDS) == len(set(KINDS)) == 2 * len(COUPLES) == 16
    assert all(partner(partner(kind)) == kind != partner(kind) for kind in KINDS)


def test_scene_is_a_pure_function_of_seed_split_and_index():
    assert make_scene("train", 7, Settings()) == make_scene("train", 7, Settings(train=10, grain=0, fog=0))
    others = [("train", 8, 0), ("held_out", 7, 0), ("train", 7, 1)]
    scenes = [make_scene(split, i, Settings(seed=seed)) for split, i, seed in [("train", 7, 0), *others]]
    assert len({scene.groups for scene in scenes}) == 4
    assert scenes[0].id == "train-000007"


@pytest.mark.parametrize("split", MIXED)
def test_things_stand_as_the_design_says(scenes, split):
    for scene in scenes[split]:
        assert (scene.rows, scene.columns) in GRIDS
        assert 1 <= len(scene.groups) <= min(3, scene.rows * scene.columns)
        assert len(set(scene.kinds)) == len(scene.kinds)
        regions = [scene.region_of(group[0]) for group in scene.groups]
        assert all(a < b for a, b in pairwise(regions))  # raster order, one group each
        for group, region in zip(scene.groups, regions, strict=True):
            assert {scene.region_of(thing) for thing in group} == {region}
            assert 0 <= region[0] < scene.rows and 0 <= region[1] < scene.columns
            if len(group) == 2:
                a, b = group  # in the order of reading
                assert (b.row - a.row, b.column - a.column) in ((0, 1), (1, 0))
            else:
                assert len(group) == 1


def assert_alike(found, options):
    """As many of each, within 4.5 standard deviations."""
    mean = found.total() / options
    assert len(found) == options and all(abs(n - mean) < 4.5 * mean**0.5 for n in found.values()), found


def test_single_things_stand_in_each_cell_alike(scenes):
    found = Counter(
        (thing.row % SIDE, thing.column % SIDE)
        for scene in scenes["train"]
        for group in scene.groups
        for thing in group
        if len(group) == 1
    )
    assert_alike(found, SIDE**2)


def looks(things):
    return [(thing.kind, thing.colour, thing.size) for thing in things]


def test_one_lesson_fills_regions_with_what_it_repeats(scenes):
    for scene in scenes["regions"]:
        assert not scene.repeats and 1 <= len(scene.groups) <= 3
        kinds = []
        for group in scene.groups:
            (region,) = {scene.region_of(thing) for thing in group}
            at = {(t.row - SIDE * region[0], t.column - SIDE * region[1]): t for t in group}
            assert list(product(range(SIDE), range(SIDE))) == sorted(at) and group[0] is at[0, 0]
            assert len(set(looks(group))) == 1
            kinds.append(group[0].kind)
        assert len(set(kinds)) == len(kinds)


def test_one_lesson_has_pairs_of_any_kinds(scenes):
    assert all(len(group) == 2 for scene in scenes["pairs"] for group in scene.groups)
    found = pairs(scenes["pairs"])
    share = sum(partner(a.kind) == b.kind for a, b in found) / len(found)
    assert share == pytest.approx(1 / 15, abs=0.03)


def test_one_lesson_repeats_one_thing_in_every_cell(scenes):
    for scene in scenes["everywhere"]:
        assert scene.repeats
        (group,) = scene.groups
        cells = product(range(scene.rows * SIDE), range(scene.columns * SIDE))
        assert [(thing.row, thing.column) for thing in group] == list(cells)
        assert len({(thing.kind, thing.colour, thing.size) for thing in group}) == 1
        assert scene.find(group[0].kind) == group[0]
        assert scene.find(partner(group[0].kind)) is None


def test_partners_meet_as_often_as_the_bias_says(scenes):
    def share(split):
        return sum(partner(a.kind) == b.kind for a, b in pairs(scenes[split])) / len(pairs(scenes[split]))

    # Some 2200 pairs: a standard deviation is 0.009.
    assert share("train") == pytest.approx(0.8, abs=0.035)
    assert share("held_out") == pytest.approx(0.8, abs=0.035)
    assert share("unbiased") == pytest.approx(1 / 15, abs=0.03)


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_extreme_biases_are_exact(bias, share):
    found = pairs(make_scene("train", i, Settings(bias=bias)) for i in range(300))
    assert sum(partner(a.kind) == b.kind for a, b in found) == share * len(found)


def test_broken_split_has_no_partners_anywhere(scenes):
    assert not any(partner(kind) in scene.kinds for scene in scenes["broken"] for kind in scene.kinds)


@pytest.mark.parametrize("split", SPLITS)
def test_each_property_by_itself_has_one_law_in_every_split(scenes, split):
    things = [thing for scene in scenes[split] for thing in scene.things[: None if split in MIXED else 1]]
    for found, options in (
        (Counter(t.kind for t in things), KINDS),
        (Counter(t.colour for t in things), tuple(COLOURS)),
        (Counter(t.size for t in things), SIZES),
        (Counter((s.rows, s.columns) for s in scenes[split]), GRIDS),
    ):
        assert set(found) == set(options)
        assert_alike(found, len(options))
    if split not in MIXED:
        return
    assert_alike(Counter(pair[1].kind for pair in pairs(scenes[split])), len(KINDS))


def test_json_keeps_everything(scenes):
    for scene in scenes["train"][:50] + scenes["everywhere"][:50] + scenes["pairs"][:50]:
        assert Scene.from_json(scene.to_json()) == scene


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"groups": [[{"kind": "cup"}]]}'])
def test_other_json_is_refused(text):
    with pytest.raises(InputError, match="is not a scene's JSON"):
        Scene.from_json(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": 1.2}, "bias: found 1.2"),
        ({"bias": float("nan")}, "bias: found nan"),
        ({"grain": -1.0}, "grain: found -1.0"),
        ({"fog": 1.0}, "fog: found 1.0"),
        ({"fog": -0.1}, "fog: found -0.1"),
        ({"train": -3}, "train: found -3"),
        ({"lessons": -1}, "lessons: found -1"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Settings(**fields)


def test_unknown_split_is_refused():
    with pytest.raises(InputError, match="'test'; give one of train, held_out"):
        make_scene("test", 0, Settings())
