"""Several data sets with weights: their shares of a mixed file, or of what a run sees."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from mllm_align.errors import InputError, one_line, refusal


class Weighted(NamedTuple):
    """A data set and its weight, above 0."""

    file: Path
    weight: float


def weighted(texts: Sequence[str | Path], option: str) -> list[Weighted]:
    """Data sets of texts such as `pairs.jsonl:2`; without a weight it is 1.

    A name that exists as it is written has no weight. Raises InputError, which names the option, for a
    weight that is no number above 0.
    """
    return [_weighted(os.fspath(text), option) for text in texts]


def _weighted(text: str, option: str) -> Weighted:
    name, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Weighted(Path(text), 1.0)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0 and name):
        problem = f"'{one_line(weight)}' in '{one_line(text)}' is no weight"
        raise refusal(option, problem, "give FILE:WEIGHT with a number above 0, such as pairs.jsonl:2")
    return Weighted(Path(name), value)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` cut into whole numbers in proportion to the weights: the largest remainders are rounded up,
    of equal ones the first."""
    exact = [total * part for part in _parts(weights)]
    counts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def most(counts: Sequence[int], weights: Sequence[float]) -> int:
    """The largest total of which every share is there."""
    return min(math.floor(count / part) for count, part in zip(counts, _parts(weights), strict=True))


def _parts(weights: Sequence[float]) -> list[Fraction]:
    """Of 1, exactly: 0.7 and 0.3 are 7 and 3 tenths."""
    exact = [Fraction(repr(weight)) for weight in weights]
    return [each / sum(exact) for each in exact]


def check_shares(needed: Sequence[int], there: Sequence[int], names: Sequence[str], option: str) -> None:
    """Refuse shares that a set has too few records for."""
    for name, wanted, found in zip(names, needed, there, strict=True):
        if wanted > found:
            raise InputError(
                f"{name} has {found} records to take, its share is {wanted}; give less {option}, or it a "
                "smaller weight"
            )
