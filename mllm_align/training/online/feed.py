"""From batches of the data to batches that the step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mllm_align.batch import PromptGroup
from mllm_align.config import Config, OnlinePairs
from mllm_align.data.batches import HostBatch
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.models.bundle import Bundle
from mllm_align.training.online.common import Common, Pending, Trainable
from mllm_align.training.online.pairs import Pairs
from mllm_align.training.online.rejected import Rejected

Maker = Pairs | Rejected


def make_maker(
    config: Config, bundle: Bundle, encoder: Encoder, records: Sequence[Encoded], out: Path
) -> Maker | None:
    """The maker that a config asks for. Raises InputError for records that it can't work on and annotators
    that can't be opened; writes nothing."""
    online = config.online
    if online is None:
        return None
    common = Common(config, bundle, encoder, records)
    if isinstance(online, OnlinePairs):
        return Pairs(common, online, out)
    return Rejected(common, online)


class Feed:
    """What the step takes, one batch after the other.

    ahead: batches of the data, from the step that the run goes on from. maker: None where all responses
    come from the data. saved: a batch that was begun before the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        ahead: Iterator[HostBatch],
        put: Callable[[HostBatch], PromptGroup],
        records: Sequence[Encoded],
        maker: Maker | None,
        last: int,
        saved: Any = None,
    ):
        self.ahead, self.put, self.records, self.maker, self.last = ahead, put, records, maker, last
        self.pending: Pending | None = None
        self.waited = 0.0
        """Seconds of the last call that went to waiting for batches of the data."""
        if saved is not None and isinstance(maker, Pairs):
            self.pending = maker.restored(saved, *self._next())

    def _next(self) -> tuple[HostBatch, PromptGroup]:
        began = time.perf_counter()
        batch = next(self.ahead)
        group = self.put(batch)
        self.waited += time.perf_counter() - began
        return batch, group

    def __call__(self, trained: Any, step: int) -> Trainable:
        """The batch of a step, counted from 0; trained: the policy before it."""
        self.waited = 0.0
        if self.maker is None:
            batch, group = self._next()
            return Trainable(group, batch, tuple(self.records[i] for i in batch.records))
        pending = self.pending or self.maker.begin(*self._next(), trained, step)
        self.pending = None
        if self.maker.ahead and step < self.last:  # before the step that gives up these parameters
            self.pending = self.maker.begin(*self._next(), trained, step)
        return self.maker.finish(pending)

    def close(self) -> None:
        if self.maker is not None:
            self.maker.close()

    def saved(self) -> Any:
        """What a checkpoint must hold beside the state, or None."""
        if self.pending is None or not isinstance(self.maker, Pairs):  # nothing else is made ahead
            return None
        return self.maker.saved(self.pending)
