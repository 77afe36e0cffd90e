"""Intervals against closed forms, and what they do where there is too little to say."""

import json
import math
import time

import numpy as np
import pytest

from mllm_align.evaluation.intervals import Interval, bootstrap, over_seeds


def test_bootstrap_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(values, draws=4000)
    half = 1.96 * values.std() / 20
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_bootstrap_resamples_items_whole():
    # The ratio is the same in every item, so it does not vary however they are drawn.
    below = np.arange(1.0, 51)
    items = np.stack([0.25 * below, below], axis=1)
    found = bootstrap(items, lambda means: means[..., 0] / means[..., 1])
    assert found.low == pytest.approx(0.25) and found.high == pytest.approx(0.25)


def test_bootstrap_is_reproducible_and_widens_with_the_level():
    values = np.random.default_rng(0).random(50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    narrow, wide = bootstrap(values, level=0.5), bootstrap(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_is_quick():
    items = np.ones((300, 16))
    start = time.process_time()
    bootstrap(items)
    assert time.process_time() - start < 0.5


def test_over_seeds_is_students_interval():
    found = over_seeds([1.0, 2.0, 3.0])
    # t with 2 degrees of freedom: 4.302653 at 0.975; the standard error is 1 / sqrt(3).
    assert found.mean == 2 and found.n == 3
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_item_or_none_has_no_interval():
    for found in (over_seeds([0.5]), bootstrap(np.array([0.5]))):
        assert found.to_json() == {"mean": 0.5, "low": None, "high": None, "n": 1}
    for found in (over_seeds([]), bootstrap(np.zeros((0, 3)))):
        assert found.to_json() == {"mean": None, "low": None, "high": None, "n": 0}


def test_from_json_is_its_way_back():
    for found in (bootstrap(np.arange(4.0)), Interval(0.5, math.nan, math.nan, 1)):
        assert str(Interval.from_json(found.to_json())) == str(found)
    for value in (None, "x", [1], {}):
        assert Interval.from_json(value).n == 0 and math.isnan(Interval.from_json(value).mean)
    assert Interval.from_json(7).mean == 7 and not Interval.from_json(7).bounded


def test_the_side_of_an_interval():
    low, high, wide = Interval(1, 0, 2, 9), Interval(4, 3, 5, 9), Interval(3, 1, 5, 9)
    assert (high.side(low), low.side(high), wide.side(low), high.side(wide)) == (1, -1, 0, 0)
    assert high.side(Interval(1, math.nan, math.nan, 1)) == 0


def test_to_json_is_json():
    text = json.dumps(Interval(0.5, 0.25, 0.75, 4).to_json(), allow_nan=False)
    assert json.loads(text) == {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
