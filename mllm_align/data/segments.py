"""Tokens in which the chosen and the rejected response of a pair differ."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np

LEAST = 3  # tokens of a common run; shorter ones count as chance


def changed_tokens(tokens: Any, mask: Any) -> np.ndarray:
    """[B, K, R] bool, True at the tokens of changed spans of the first two responses (see `spans`).

    tokens, mask [B, K, R]: as in `batch.Responses`.
    """
    changed = np.zeros(np.shape(mask), bool)
    for row, (ids, real) in enumerate(zip(np.asarray(tokens), np.asarray(mask), strict=True)):
        chosen, rejected = (ids[k][real[k]].tolist() for k in (0, 1))
        for first, second in spans(chosen, rejected):
            changed[row, 0, first], changed[row, 1, second] = True, True
    return changed


def spans(first: Sequence[int], second: Sequence[int]) -> list[tuple[slice, slice]]:
    """Spans of two sequences that stand in each other's place between common runs of at least LEAST items.

    A span without a counterpart, which the other sequence leaves out, is none. As in RLHF-V's and CHiP's
    released code (arXiv 2312.00849, 2501.16629), which match the second sequence against the first.
    """
    blocks = SequenceMatcher(None, second, first).get_matching_blocks()
    found, at, there = [], 0, 0
    for b, a, size in blocks:
        if 0 < size < LEAST:
            continue
        if a > at and b > there:
            found.append((slice(at, a), slice(there, b)))
        at, there = a + size, b + size
    return found
