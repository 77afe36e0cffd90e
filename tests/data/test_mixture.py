"""Weights of data sets, and their shares."""

from pathlib import Path

import numpy as np
import pytest
from published import trl
from refusals import assert_refusal

from mllm_align.data.mixture import Draws, Mixture, check_shares, mixture, most, shares, weighted
from mllm_align.data.records import parse_record


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


# ---- while training ----------------------------------------------------------------------------------

SOURCES = ["a"] * 30 + ["b"] * 5 + ["c"] * 5
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 1.0}


def test_an_epoch_has_of_each_set_its_share():
    drawn = Draws(SOURCES, WEIGHTS, seed=3)
    for epoch in range(12):
        sets = [SOURCES[i] for i in drawn(epoch)]
        assert [sets.count(name) for name in WEIGHTS] == [10, 20, 10]


def test_within_a_set_no_record_comes_again_before_all_have_come():
    drawn = Draws(SOURCES, WEIGHTS, seed=3)
    whole = np.concatenate([drawn(epoch) for epoch in range(9)])
    for name in WEIGHTS:
        own = [i for i in whole if SOURCES[i] == name]
        size, orders = SOURCES.count(name), []
        for start in range(0, len(own) - size + 1, size):
            orders.append(own[start : start + size])
            assert sorted(orders[-1]) == [i for i, each in enumerate(SOURCES) if each == name]
        assert len({tuple(order) for order in orders}) > 1, "each pass has an order of its own"


def test_an_epoch_follows_from_seed_and_number_alone():
    drawn = Draws(SOURCES, WEIGHTS, seed=3)
    later = drawn(7)
    assert np.array_equal(Draws(SOURCES, WEIGHTS, seed=3)(7), later) and np.array_equal(drawn(7), later)
    assert not np.array_equal(Draws(SOURCES, WEIGHTS, seed=4)(7), later)


def test_sets_that_cannot_have_their_share():
    assert_refusal(lambda: Draws(["a"] * 9, {"a": 1, "b": 1}, 0), "no record of b is left")
    few = lambda: Draws(["a"] * 9 + ["b"], {"a": 99, "b": 1}, 0)  # noqa: E731
    assert_refusal(few, "b has less than one of the 10 records of an epoch")


def test_a_mixture_says_what_it_is_of(tmp_path):
    made = Mixture({tmp_path / "x/a.jsonl": 2, tmp_path / "y/a.jsonl": 0.5})
    assert made.named == {"x-a.jsonl": 2.0, "y-a.jsonl": 0.5} and str(made).endswith("y/a.jsonl:0.5")
    for weights in ({}, {"a": 0}, {"a": -1.0}, {"a": float("nan")}, {"a": "2"}, {"a": True}):
        assert_refusal(lambda weights=weights: Mixture(weights), "mixture")
    assert_refusal(lambda: mixture(weighted(["a", "a:2"], "--data")), "a is given twice")


def test_records_of_a_mixture_know_their_set_and_have_ids_of_their_own():
    def record(id):
        return parse_record(trl(id=id), index=0, where="record", root=None)

    joined = Mixture.joined({"a": [record("1"), record("2")], "b": [record("1"), record("b:1")]})
    assert [(each.id, each.source) for each in joined] == [
        *(("1", "a"), ("2", "a"), ("b:1", "b"), ("b:b:1", "b")),
    ]
