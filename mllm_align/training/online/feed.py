"""From batches of the data to batches that the step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
    """What the step takes, one update after the other.

    ahead: batches of the data, from the first one of the round that the run goes on in. put: a batch to the
    devices. steps: updates of the run; begun: taken already. saved: what the checkpoint that the run goes
    on from keeps of the maker.
    """

    def __init__(
        self,
        ahead: Iterator[HostBatch],
        put: Callable[[HostBatch], PromptGroup],
        maker: Maker[S],
        config: Config,
        steps: int,
        begun: int = 0,
        saved: MakerState | None = None,
    ):
        self.ahead, self.put, self.maker, self.steps = ahead, put, maker, steps
        self.rounds, self.seed = config.rounds, config.seed
        self.waited = 0.0
        """Seconds of the last call that went to waiting for batches of the data."""
        self.round: list[S] = []
        """The batches that updates are being taken on."""
        self.next: list[S] = []
        """Those of the round after, where they are begun ahead."""
        self._between = begun % self.rounds.updates == 0
        if saved is not None:
            restored = maker.restored(saved, self._batches())
            self.round, self.next = ([], restored) if self._between else (restored, [])

    def _batches(self) -> list[tuple[HostBatch, PromptGroup]]:
        """Of the data, for one round."""
        began = time.perf_counter()
        batches = [next(self.ahead) for _ in range(self.rounds.minibatches)]
        made = [(batch, self.put(batch)) for batch in batches]
        self.waited += time.perf_counter() - began
        return made

    def _begin(self, trained: Tree, step: int) -> list[S]:
        return [self.maker.begin(*each, trained, step) for each in self._batches()]

    def __call__(self, trained: Tree, step: int) -> TrainBatch:
        """The batch of an update, counted from 0; trained: the policy before it."""
        self.waited, rounds = 0.0, self.rounds
        if step % rounds.updates == 0:
            self.round, self.next = self.next or self._begin(trained, step), []
            if self.maker.ahead and step + rounds.updates < self.steps:
                # before the step that gives up these parameters
                self.next = self._begin(trained, step)
            self.maker.complete(self.round)
        made = self.maker.finish(self.round[rounds.which(step, self.seed)])
        self._between = (step + 1) % rounds.updates == 0
        stale = {"staleness": (step % rounds.updates, 1.0)} if rounds.updates > 1 else {}
        return replace(made, step=step, metrics=made.metrics | stale)

    def saved(self) -> MakerState | None:
        """What a checkpoint must hold beside the training state."""
        return self.maker.saved(self.next if self._between else self.round)

    def close(self) -> None:
        self.maker.close()
