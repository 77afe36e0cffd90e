"""Weights of data sets, and their shares."""

from pathlib import Path

import numpy as np
import pytest
from refusals import assert_refusal

from mllm_align.data.mixture import check_shares, most, shares, weighted


def test_weights_follow_the_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:2").touch()
    found = weighted(["a.jsonl:2", "b", "x/c:d.json:0.5", "odd:2", Path("e:1e-2")], "--data")
    assert [(str(file), weight) for file, weight in found] == [
        *(("a.jsonl", 2.0), ("b", 1.0), ("x/c:d.json", 0.5), ("odd:2", 1.0), ("e", 0.01)),
    ]


@pytest.mark.parametrize("text", ["a:0", "a:-1", "a:nan", "a:inf", "a:x", "a:", ":1"])
def test_bad_weights(text):
    assert_refusal(lambda: weighted([text], "--data"), "--data", "is no weight", "a number above 0")


@pytest.mark.parametrize(
    "total, weights, wanted",
    [(10, [1, 1], [5, 5]), (5, [1, 1], [3, 2]), (7, [0.5, 0.25, 0.25], [3, 2, 2]), (0, [1, 2], [0, 0])],
)
def test_shares(total, weights, wanted):
    assert shares(total, weights) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_whole_near_and_as_large_as_the_counts_allow(seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        weights = rng.uniform(0.1, 5, rng.integers(1, 5)).tolist()
        there = rng.integers(0, 200, len(weights)).tolist()
        total = most(there, weights)
        found = shares(total, weights)
        assert sum(found) == total and all(n <= c for n, c in zip(found, there, strict=True))
        assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(found, weights, strict=True))
        assert any((total + 1) * w / sum(weights) > c for w, c in zip(weights, there, strict=True))


def test_decimal_weights_are_exact():
    assert most([7, 3], [0.7, 0.3]) == 10 and shares(10, [0.7, 0.2, 0.1]) == [7, 2, 1]


def test_a_share_that_is_not_there():
    check_shares([2, 3], [2, 9], ["a", "b"], "--limit")
    assert_refusal(
        lambda: check_shares([2, 3], [2, 1], ["a", "b"], "--limit"), "b has 1 records", "share is 3"
    )
