"""Makers of responses: what stands between a batch of the data and the batch that the step takes.

A maker begins a batch with the policy as it is, and finishes it when the step wants it. The step never
knows where responses came from. A group for which no usable responses came about keeps its place with
weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from mllm_align.batch import PromptGroup, Shape
from mllm_align.data.batches import HostBatch
from mllm_align.data.encode import Encoded

BatchOf = Callable[[int], tuple[HostBatch, PromptGroup]]
"""Number of a batch of the data -> it, as it was read and on the devices."""

HostMetrics = dict[str, tuple[float, float]]
"""Name -> (sum, weight), of one step, on the host."""

Tree = dict[str, Any]
"""Arrays by the names of modules: what is trained."""


@dataclass
class InFlight:
    """A batch whose responses are being made: as it was read, and on the devices."""

    batch: HostBatch
    group: PromptGroup


@dataclass(frozen=True)
class TrainBatch:
    """What the step takes.

    step: the update, counted from 0. indices: of the batch's records in the data. shape: what all are
    padded to.
    records: as they are trained on; None for a group without usable responses. example: what the policy
    wrote for one of them, for people to read.
    """

    group: PromptGroup
    step: int
    indices: tuple[int, ...]
    shape: Shape
    records: tuple[Encoded | None, ...]
    metrics: HostMetrics = field(default_factory=dict)
    example: dict[str, Any] | None = None


@dataclass(frozen=True)
class MakerState:
    """What a checkpoint keeps of a maker.

    metadata: JSON values. arrays: on the host, the same on every process; none is empty.
    """

    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


S = TypeVar("S", bound=InFlight)


class Maker(Protocol[S]):
    """S: the type of its batches in flight.

    ahead: a batch is begun before the step on the one before it.
    on_policy: responses are made by the policy that the step updates, so they wait for the step before.
    """

    ahead: bool = False
    on_policy: bool = True

    def start(self, trained: Tree, step: int, batch: BatchOf) -> None:
        """Called once, before all else, with the policy after `step` updates and what gives any batch of
        the data."""

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Tree, step: int) -> S:
        """Start on a batch. trained: the policy after `step` updates; not valid after the next one."""
        ...

    def complete(self, round: Sequence[S]) -> None:
        """Do what needs the policy that responded, before it is updated. round: all batches that were
        begun with it (`config.online.Rounds`)."""

    def finish(self, pending: S) -> TrainBatch:
        """Wait for the responses. Raises NotFinite where the config says to stop there. Where a round has
        several epochs, it is asked again for the same batch."""
        ...

    def saved(self, round: Sequence[S]) -> MakerState | None:
        """What a checkpoint must hold beside the training state. round: batches begun, and not done with:
        begun ahead, or of a round that still has updates; often none."""
        return None

    def restored(self, state: MakerState, batches: Sequence[tuple[HostBatch, PromptGroup]]) -> list[S]:
        """The round that `saved` was asked about. Raises InputError for a state that it can't read."""
        raise TypeError(f"{type(self).__name__} saves nothing")

    def close(self) -> None:
        """Give up what is in flight."""


class Offline(Maker[InFlight]):
    """All responses come with the data."""

    on_policy = False

    def __init__(self, records: Sequence[Encoded]):
        self.records = records

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Tree, step: int) -> InFlight:
        return InFlight(batch, group)

    def finish(self, pending: InFlight) -> TrainBatch:
        batch = pending.batch
        records = tuple(self.records[i] for i in batch.records)
        return TrainBatch(pending.group, batch.step, batch.records, batch.shape, records)
