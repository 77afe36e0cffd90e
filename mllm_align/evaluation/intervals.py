"""How sure a figure is: bootstrap intervals over pictures, t intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure from `n` items with the ends of its interval; these are nan where n is too small."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def side(self, other: Interval) -> int:
        """1 if wholly above the other, -1 if wholly below; 0 if they meet or an end is missing."""
        return (self.low > other.high) - (self.high < other.low)

    @staticmethod
    def from_json(value: Any) -> Interval:
        """The interval of `to_json`, or of a bare number; what is missing is nan, and an `n` of 0."""
        given = value if isinstance(value, Mapping) else {"mean": value}
        ends = (given.get(key) for key in ("mean", "low", "high"))
        mean, low, high = (float(end) if isinstance(end, Real) else math.nan for end in ends)
        return Interval(mean, low, high, given.get("n") or 0)

    def to_json(self) -> dict[str, float | int | None]:
        """Return a dictionary for JSON, which knows no nan: None stands for it."""
        values = asdict(self)
        return {k: None if math.isnan(value) else value for k, value in values.items()}


def bootstrap(
    items: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda means: means[..., 0],
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Return the percentile bootstrap interval of a statistic of the items' means.

    items: [n, columns], or [n] for one column. statistic: takes means over items, [..., columns], and
    returns [...]; a ratio of totals is the ratio of two means. As it sees nothing but means, a
    thousand draws are one matrix product.
    """
    items = np.asarray(items, np.float64)
    items = items[:, None] if items.ndim == 1 else items
    n = len(items)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(statistic(items.mean(0)))
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    picks = np.random.default_rng(seed).integers(n, size=(draws, n))
    # How often each item is drawn: every draw counts in n bins of its own.
    picks += n * np.arange(draws)[:, None]
    weights = np.bincount(picks.ravel(), minlength=draws * n).reshape(draws, n)
    drawn = statistic(weights @ items / n)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), n)


def over_seeds(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of one figure over runs with Student's t interval."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    from scipy import stats  # takes long to import

    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)
