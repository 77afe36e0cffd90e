"""Several data sets with weights: their shares of a mixed file, or of what a run sees.

A run's epoch has as many records as all sets hold, of each set its share, whatever its size. Every set is
gone through in orders of its own, one pass after the other, across epochs: so within a set, no record comes
a second time before all have come once. Which records an epoch has follows from the seed and its number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mllm_align.data.records import Record
from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import names_apart


@dataclass(frozen=True)
class Mixture:
    """Data sets to train on, by weight: `Mixture({"a.jsonl": 2, "b.parquet": 1})`.

    A set's share of what is trained on is its weight's share of all weights. Raises InputError for no sets,
    and for a weight that is no number above 0.
    """

    weights: Mapping[str | Path, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise refusal("mixture", "has no data sets", "give a weight for each")
        for file, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not _is_weight(weight):
                problem = f"the weight of {one_line(file)} is {one_line(weight)}"
                raise refusal("mixture", problem, "give a number above 0")

    def __str__(self) -> str:
        return " ".join(f"{file}:{weight:g}" for file, weight in self.weights.items())

    @property
    def files(self) -> dict[str, Path]:
        """The sets by short names. Raises InputError for one that is given twice."""
        return set_names([Path(file) for file in self.weights])

    @property
    def named(self) -> dict[str, float]:
        """Their weights by these names."""
        return dict(zip(self.files, map(float, self.weights.values()), strict=True))

    @staticmethod
    def joined(sets: Mapping[str, Sequence[Record]]) -> list[Record]:
        """All records, each with its set's name as source; ids that repeat get it in front."""
        seen: set[str] = set()
        records = []
        for name, own in sets.items():
            for record in own:
                id = record.id
                while id in seen:
                    id = f"{name}:{id}"
                seen.add(id)
                records.append(replace(record, id=id, source=name))
        return records


def set_names(files: Sequence[Path]) -> dict[str, Path]:
    """A short name for each data set. Raises InputError for one that is given twice."""
    return dict(zip(names_apart(files), files, strict=True))


class Draws:
    """Which records a mixture's epochs have.

    sources: of each record its set. weights: of each set.
    """

    def __init__(self, sources: Sequence[str], weights: Mapping[str, float], seed: int):
        self.seed = seed
        self._members = [np.flatnonzero([each == name for each in sources]) for name in weights]
        self._counts = shares(len(sources), list(weights.values()))
        for name, own, count in zip(weights, self._members, self._counts, strict=True):
            if not len(own):
                raise InputError(f"no record of {name} is left to train on; give others, or leave it out")
            if not count:
                problem = f"{name} has less than one of the {len(sources)} records of an epoch"
                raise InputError(f"{problem}; give it a larger weight")

    def __call__(self, epoch: int) -> np.ndarray:
        """Indices of an epoch's records, set by set; one that comes several times is there as often."""
        parts = []
        for number, (own, count) in enumerate(zip(self._members, self._counts, strict=True)):
            first, size = epoch * count, len(own)
            passes = range(first // size, (first + count - 1) // size + 1)
            orders = [np.random.default_rng((self.seed, number, each)).permutation(own) for each in passes]
            begin = first - passes[0] * size
            parts.append(np.concatenate(orders)[begin : begin + count])
        return np.concatenate(parts)


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


def mixture(sets: Sequence[Weighted]) -> Mixture:
    """Of sets as `weighted` gives them. Raises InputError for one that is given twice."""
    names_apart([each.file for each in sets])
    return Mixture({each.file: each.weight for each in sets})


def _weighted(text: str, option: str) -> Weighted:
    name, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Weighted(Path(text), 1.0)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (_is_weight(value) and name):
        problem = f"'{one_line(weight)}' in '{one_line(text)}' is no weight"
        raise refusal(option, problem, "give FILE:WEIGHT with a number above 0, such as pairs.jsonl:2")
    return Weighted(Path(name), value)


def _is_weight(value: float) -> bool:
    return math.isfinite(value) and value > 0


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
