"""Padded sizes: never too small, few, and near what is needed."""

from itertools import count, pairwise

import numpy as np
import pytest

from mllm_align.batch import Shape
from mllm_align.sizes import (
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
    sizes = np.random.default_rng(seed).integers((1, 1, 0), (200, 40, 6), (number, 3))
    return [Shape(*map(int, each)) for each in sizes]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("number", [1, 2, 5, 64])
@pytest.mark.parametrize("multiple", [1, 32])
def test_ladder(steps, number, multiple):
    shapes = some(number, seed=steps)
    rungs = ladder(shapes, 2, steps, multiple)
    assert 1 <= len(rungs) <= steps and len(set(rungs)) == len(rungs)
    assert all(high.holds(low) for low, high in pairwise(rungs))
    assert all(rungs[-1].holds(shape) for shape in shapes)
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
