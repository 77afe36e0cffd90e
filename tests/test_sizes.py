"""Padded sizes: never too small, few, and near what is needed."""

from functools import reduce
from itertools import combinations, count, product

import numpy as np
import pytest

from mllm_align.batch import Shape
from mllm_align.sizes import (
    WORTH,
    binary_fraction,
    bucket,
    half_steps,
    ladder,
    round_up,
    rounded,
    rows_of_part,
    tiles,
)


def test_round_up():
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


def test_buckets_are_few_and_near():
    sizes = [bucket(n) for n in range(1, 500)]
    assert len(set(sizes)) == 13
    assert all(n <= b <= max(8, 1.5 * n) for n, b in zip(range(1, 500), sizes, strict=True))
    assert [bucket(n, 1) for n in (0, 1, 2, 3, 4, 5, 7)] == [1, 1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize("limit", [1, 7, 12, 32, 100, 256, 1000])
def test_a_binary_fraction_of_a_limit_holds_what_it_must(limit):
    sizes = [binary_fraction(n, limit) for n in range(1, limit + 1)]
    assert len(set(sizes)) <= 3 and sizes == sorted(sizes)
    assert all(n <= size < limit + 8 and size % 8 == 0 for n, size in enumerate(sizes, 1))
    assert [binary_fraction(n, 256) for n in (1, 64, 65, 128, 129, 256)] == [64, 64, 128, 128, 256, 256]


@pytest.mark.parametrize("usual", [1, 8, 24, 40, 100])
def test_half_steps_are_the_first_of_an_arithmetic_series(usual):
    for needed in range(1, 5 * usual):
        step = -(-usual // 16) * 8
        assert half_steps(needed, usual) == next(n for n in count(usual, step) if n >= needed)


@pytest.mark.parametrize(
    "rows, shards, parts",
    [
        (8, 1, {1: 2, 2: 2, 3: 4, 5: 6, 8: 8, 20: 8}),
        (2, 1, {1: 1, 2: 2, 3: 2}),
        (8, 4, {1: 4, 5: 8, 20: 8}),
        (16, 2, {1: 4, 5: 8, 13: 16}),
    ],
)
def test_rows_of_part(rows, shards, parts):
    assert {n: rows_of_part(n, rows, shards) for n in parts} == parts


def test_tiles_of_one_embedding_are_rounded():
    assert [tiles(n, 576) for n in (1, 3, 5)] == [1, 3, 5]
    assert [tiles(n, 1) for n in (0, 1, 65, 1280)] == [0, 64, 96, 1536]


# ---- shapes of batches -------------------------------------------------------------------------------


def some(number, seed):
    """Prompts of up to 199 tokens, responses of up to 39, up to 5 tiles."""
    sizes = np.random.default_rng(seed).integers((1, 1, 0), (200, 40, 6), (number, 3))
    return [Shape(*map(int, each)) for each in sizes]


@pytest.mark.parametrize("steps", [1, 2, 4, 100])
@pytest.mark.parametrize("number", [1, 5, 20])
@pytest.mark.parametrize("multiple", [1, 32])
def test_ladder(steps, number, multiple):
    shapes = some(number, seed=steps)
    rungs = ladder(shapes, 2, steps, multiple)
    assert 1 <= len(rungs) <= steps and len(set(rungs)) == len(rungs)
    assert sorted(map(padded, rungs)) == list(map(padded, rungs))
    assert all(rungs[-1].holds(each) for each in (*shapes, *rungs))
    assert all(r.prefix % multiple == 0 and r.response % max(multiple // 4, 1) == 0 for r in rungs)
    # no more than it takes
    assert rungs[-1].tiles == max(s.tiles for s in shapes)
    assert rungs[-1].prefix < max(s.prefix for s in shapes) + multiple


def test_rounded_shapes():
    assert rounded(Shape(33, 9, 5), 32) == Shape(64, 16, 5)
    assert rounded(Shape(64, 16, 0), 32) == Shape(64, 16, 0)
    assert rounded(Shape(33, 9, 5), 1) == Shape(33, 9, 5)
    assert rounded(Shape(33, 9, 5, ((7, 2),)), 32) == Shape(64, 16, 5, ((32, 2),))


def test_records_of_one_length_share_one_shape():
    assert ladder([Shape(10, 3, 1)] * 9, 2, 4, 32) == (Shape(32, 8, 1),)


def padded(shape):
    return sum(length for length, _ in shape.prefixes) + 2 * shape.response


def paid(shapes, rungs):
    """Tokens of all records, each on the shortest rung that holds it."""
    return sum(min(padded(rung) for rung in rungs if rung.holds(each)) for each in shapes)


@pytest.mark.parametrize("seed", range(2))
def test_rungs_pad_about_as_little_as_the_best_of_all(seed):
    """Every choice of three rungs is tried."""
    shapes = [rounded(each, 32) for each in some(30, seed)]
    whole = reduce(Shape.union, shapes)
    sizes = product({s.prefix for s in shapes}, {s.response for s in shapes})
    corners = [Shape(*each, whole.tiles) for each in sizes]
    least = min(paid(shapes, [whole, *each]) for each in combinations(corners, 2))
    assert least <= paid(shapes, ladder(shapes, 2, 3, 32)) <= 1.02 * least


def test_long_prompts_and_long_responses_are_rungs_apart():
    """Neither pads the other: four kinds of records, four shapes without padding."""
    kinds = [Shape(p, r, tiles) for (p, tiles), r in product(((640, 3), (2880, 5)), (64, 512))]
    assert set(ladder(kinds * 5, 2, 8, 32)) == set(kinds)


def test_a_rung_is_worth_its_program():
    one, rare = Shape(320, 40, 1), Shape(640, 40, 1)
    assert ladder([one] * 98 + [rare] * 2, 2, 4, 32) == (one, rare)
    # what shorter records would save is too little, or they are too few
    short = Shape(288, 40, 1)
    saved = 32 / (320 + 80)  # of a record's tokens
    share = WORTH / saved
    for number, rungs in ((int(999 * share), 1), (int(1001 * share) + 1, 2)):
        assert len(ladder([one] * (1000 - number) + [short] * number, 2, 4, 32)) == rungs
    many = [one] * 90 + [short] * 10
    assert [len(ladder(many, 2, 4, 32, least)) for least in (10, 11)] == [2, 1]
    assert len(ladder([one, short] * 5, 2, 4, 32, 6)) == 1, "10 records are not two rungs of 6"


def test_records_count_as_often_as_they_are_drawn():
    shapes = [Shape(32 * n, 8, 1) for n in (1, 2, 3)]
    found = [ladder(shapes, 2, 2, 32, often=often)[0] for often in ((100, 1, 1), (1, 100, 1))]
    assert found == [shapes[0], shapes[1]]


def test_rungs_of_two_prompts():
    """Tiles and the second prompt are what the records of the rung have."""
    short, long = Shape(32, 8, 1, ((64, 2),)), Shape(320, 8, 5, ((96, 2),))
    assert ladder([short, long] * 4, 2, 4, 32) == (short, long)
