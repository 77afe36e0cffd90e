"""Which tokens of a pair differ: spans in each other's place, between common runs that are long enough."""

import numpy as np
import pytest

from mllm_align.data.segments import changed_tokens, spans


@pytest.mark.parametrize(
    "first, second, changed",
    [
        ("abcdXefgh", "abcdYefgh", [("X", "Y")]),
        ("abcdXYZefgh", "abcdUefgh", [("XYZ", "U")]),
        ("abcdefgh", "abcdefgh", []),
        ("abcdXefgh", "abcdefgh", []),  # left out by the other: no span of its own
        ("abcdXefYghij", "abcdUefVghij", [("XefY", "UefV")]),  # a run of two is chance
        ("Xabcd", "Yabcd", [("X", "Y")]),
        ("abcdX", "abcdYZ", [("X", "YZ")]),
        ("ab", "cd", [("ab", "cd")]),
    ],
)
def test_spans_by_hand(first, second, changed):
    found = spans([ord(c) for c in first], [ord(c) for c in second])
    assert [(first[a], second[b]) for a, b in found] == changed


def test_changed_tokens_stand_at_their_places():
    tokens = np.array([[[5, 6, 7, 1, 8, 0], [5, 6, 7, 2, 3, 8], [9, 9, 0, 0, 0, 0]]])
    mask = np.array([[[1, 1, 1, 1, 1, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]], bool)
    tokens, mask = np.repeat(tokens, 2, 0), np.repeat(mask, 2, 0)
    mask[1, 1] = False  # a group without a rejected response
    found = changed_tokens(tokens, mask)
    assert found[0].astype(int).tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1], [0] * 6]
    assert not found[1].any() and found.dtype == bool
