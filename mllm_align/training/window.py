"""Figures of the steps between two log lines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mllm_align.config import Config
from mllm_align.data.encode import Encoded
from mllm_align.training.flops import peak_flops
from mllm_align.training.metrics import add, divide
from mllm_align.training.online.maker import HostMetrics, TrainBatch
from mllm_align.training.step import Health


class Window:
    """Adds figures up. Device values are fetched once, when it is closed.

    flops: of a step on these records. nonfinite: called with a step that could not be taken, counted from
    1, and the indices of the records to blame. sources: of every record of the data its set, where several
    are mixed.
    """

    def __init__(
        self,
        config: Config,
        flops: Callable[[Sequence[Encoded]], float],
        nonfinite: Callable[[int, Sequence[int]], None],
        sources: Sequence[str] | None = None,
    ):
        self.config, self.flops_of, self.nonfinite = config, flops, nonfinite
        self.sources = sources
        self.total: Any = None
        self.start = time.perf_counter()
        self.real = self.padded = 0
        self.timed = self.pairs = self.tokens = 0  # of the steps that speeds are of
        self.waited = self.flops = 0.0
        self.steps: list[tuple[int, tuple[int, ...], Health]] = []
        self.metrics: HostMetrics = {}

    def add(
        self, batch: TrainBatch, metrics: Any, health: Health, waited: float, untimed: float | None = None
    ) -> None:
        """A step. waited: seconds that it waited for its batch of the data. untimed: seconds of a step that
        compiled, which no speed is of."""
        self.total = metrics if self.total is None else add(self.total, metrics)
        records = [record for record in batch.records if record is not None]
        self._count(batch.metrics)
        if self.sources is not None:
            self._count(shares(batch.indices, self.sources))
        tokens = sum(record.tokens for record in records)
        self.real += tokens
        self.padded += self.config.batch_size * batch.shape.tokens(self.config.objective.views)
        if untimed is None:
            self.timed += 1
            self.pairs += len(records)
            self.tokens += tokens
            self.flops += self.flops_of(records)
            self.waited += waited
        else:
            self.leave_out(untimed)
        self.steps.append((batch.step, batch.indices, health))

    def leave_out(self, seconds: float) -> None:
        """Time that went to something else than steps."""
        self.start += seconds

    def _count(self, metrics: HostMetrics) -> None:
        for name, (value, weight) in metrics.items():
            total = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = total[0] + value, total[1] + weight

    def updated(self, seconds: float | None) -> None:
        """How long the device took for a step, where that was waited for; None where it compiled."""
        self._count({"update/seconds": (0.0, 0.0) if seconds is None else (seconds, 1.0)})

    def check(self) -> None:
        """Report the steps that could not be taken, once each."""
        if self.steps:
            self._report(jax.device_get([health.finite for *_, health in self.steps]))

    def _report(self, finite: Sequence[Any]) -> None:
        broken = [each for each, good in zip(self.steps, finite, strict=True) if not good]
        self.steps = []
        for step, indices, health in broken:
            self.nonfinite(step + 1, culprits(indices, health))

    def close(self, step: int, steps: int, learning_rate: float) -> dict[str, Any]:
        """The figures, after so many steps of the run; speeds are null where all steps compiled.
        seconds_left is for the terminal alone."""
        total, finite = jax.device_get((self.total, [health.finite for *_, health in self.steps]))
        self._report(finite)
        values = divide(total) | divide(self.metrics)
        seconds = time.perf_counter() - self.start
        peak = peak_flops()

        def rate(count: float, of: float = seconds) -> float | None:
            return count / of if self.timed else None

        return {
            "step": step,
            **values,
            "learning_rate": learning_rate,
            "pairs_per_second": rate(self.pairs),
            "tokens_per_second": rate(self.tokens),
            "padding": 1 - self.real / self.padded,
            "flops_per_second": rate(self.flops),
            "mfu": None if peak is None else rate(self.flops / peak),
            "data_wait": rate(self.waited),
            "seconds_per_step": rate(seconds, self.timed),
            "seconds_left": rate((steps - step) * seconds, self.timed),
        }


def shares(indices: Sequence[int], sources: Sequence[str]) -> HostMetrics:
    """The share of each set among some records."""
    own = Counter(sources[i] for i in indices)
    names = dict.fromkeys(sources)
    return {f"source/{name}/share": (float(own[name]), float(len(indices))) for name in names}


def culprits(indices: Sequence[int], health: Health) -> list[int]:
    """Records of a batch whose log-probs are not finite; all of them where that can't be told."""
    rows = np.asarray(health.rows).reshape(-1)[: len(indices)]
    return [i for i, wrong in zip(indices, rows, strict=True) if wrong] or list(indices)
