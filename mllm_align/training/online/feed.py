"""From batches of the data to batches that the step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic

from mllm_align.batch import PromptGroup
from mllm_align.config import Config
from mllm_align.data.batches import HostBatch
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.models.bundle import Bundle
from mllm_align.registry import load_part
from mllm_align.training.online.context import RunContext
from mllm_align.training.online.maker import Maker, MakerState, Offline, S, TrainBatch, Tree


def open_maker(
    config: Config, bundle: Bundle, encoder: Encoder, records: Sequence[Encoded], out: Path
) -> Maker[Any]:
    """The maker that a config asks for. Raises InputError for records that it can't work on and annotators
    that can't be opened; writes nothing."""
    if config.online is None:
        return Offline(records)
    context = RunContext(config, config.online, bundle, encoder, records, out)
    return load_part(config.online.maker, "maker of responses")(context, config.online)


class Feed(Generic[S]):
    """What the step takes, one batch after the other.

    ahead: batches of the data, from the step that the run goes on from. put: a batch to the devices.
    last: the last step, counted from 0. saved: what the checkpoint that the run goes on from keeps of the
    maker.
    """

    def __init__(
        self,
        ahead: Iterator[HostBatch],
        put: Callable[[HostBatch], PromptGroup],
        maker: Maker[S],
        last: int,
        saved: MakerState | None = None,
    ):
        self.ahead, self.put, self.maker, self.last = ahead, put, maker, last
        self.waited = 0.0
        """Seconds of the last call that went to waiting for batches of the data."""
        self.pending = None if saved is None else maker.restored(saved, *self._next())

    def _next(self) -> tuple[HostBatch, PromptGroup]:
        began = time.perf_counter()
        batch = next(self.ahead)
        group = self.put(batch)
        self.waited += time.perf_counter() - began
        return batch, group

    def __call__(self, trained: Tree, step: int) -> TrainBatch:
        """The batch of a step, counted from 0; trained: the policy before it."""
        self.waited = 0.0
        pending = self.pending or self.maker.begin(*self._next(), trained, step)
        self.pending = None
        if self.maker.ahead and step < self.last:  # before the step that gives up these parameters
            self.pending = self.maker.begin(*self._next(), trained, step)
        return self.maker.finish(pending)

    def saved(self) -> MakerState | None:
        """What a checkpoint must hold beside the training state."""
        return self.maker.saved(self.pending)

    def close(self) -> None:
        self.maker.close()
