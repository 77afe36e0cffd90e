"""Batches whose responses the policy makes while it trains.

A maker takes a batch of the data and the policy as it is, and hands back the same batch with its responses
in place: the step never knows where they came from. `begin` may leave work going on; `finish` waits for it.
A group for which no usable pair came about keeps its place with weight 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from mllm_align.batch import PromptGroup, Responses
from mllm_align.config import Config, OnlinePairs
from mllm_align.data.batches import HostBatch
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.errors import not_finite
from mllm_align.generate.sampling import random_key
from mllm_align.models.bundle import Bundle
from mllm_align.sharding import assemble, batch_sharding, local_rows
from mllm_align.training.online.sampler import Sampler

Facts = dict[str, tuple[float, float]]
"""Name -> (sum, weight), of one step, on the host."""


class Response(NamedTuple):
    """ids: end of sequence included. logps: nats per token, where the policy sampled it."""

    ids: np.ndarray
    logps: np.ndarray | None = None


@dataclass
class Pending:
    """A batch whose responses are being made.

    step: that it is for. made_at: whose policy makes them. ready: what `finish` waits for, or its result.
    """

    batch: HostBatch
    group: PromptGroup
    step: int
    made_at: int
    ready: Any = None


@dataclass(frozen=True)
class Trainable:
    """What the step takes, and the records as they are trained on: None for a group without a pair.

    example: what the policy wrote for one of them, for people to read.
    """

    group: PromptGroup
    batch: HostBatch
    records: tuple[Encoded | None, ...]
    facts: Facts = field(default_factory=dict)
    example: dict[str, Any] | None = None


class Common:
    """What every maker knows: the run's records, their keys, and how responses get into a batch."""

    def __init__(self, config: Config, bundle: Bundle, encoder: Encoder, records: Sequence[Encoded]):
        self.config, self.bundle, self.encoder, self.records = config, bundle, encoder, records
        self.rows = config.batch_size // config.micro_batches
        self.held = local_rows(bundle.mesh, self.rows)
        self.where = batch_sharding(bundle.mesh)
        self.limit = config.data.max_length or bundle.config.decoder.max_length
        self.sampler = Sampler(config, bundle, getattr(config.online, "mesh", None))

    def epoch(self, step: int) -> int:
        return step // math.ceil(len(self.records) / self.config.batch_size)

    def key(self, index: int, step: int, *sample: int) -> np.ndarray:
        """Of a record in this pass over the data, whatever batch it is in."""
        return random_key(self.config.seed, self.records[index].record.id, self.epoch(step), *sample)

    def keys(self, batch: HostBatch, *sample: int) -> np.ndarray:
        """[M, B, 2]; rows that only fill the batch take those of the first."""
        count = self.config.batch_size
        indices = [*batch.records, *[batch.records[0]] * (count - len(batch.records))]
        keys = np.stack([self.key(i, batch.step, *sample) for i in indices])
        return keys.reshape(-1, self.rows, 2)

    def put(self, array: np.ndarray) -> Any:
        """[M, B, ...] on the host of every process -> the devices."""
        return assemble(array[:, self.held], self.where, self.rows, self.held)

    def filled(
        self,
        batch: HostBatch,
        group: PromptGroup,
        made: Sequence[tuple[Response, ...] | None],
        sizes: Iterable[int],
        facts: Facts,
        example: dict[str, Any] | None = None,
    ) -> Trainable:
        """The batch with these responses in place, K for each record, padded to the first of `sizes`, which
        rise, that holds them: few sizes, few programs."""
        longest = max((len(r.ids) for each in made for r in each or ()), default=1)
        most = next(size for size in sizes if size >= longest)
        size, count = self.config.batch_size, self.config.objective.responses
        tokens, mask = np.zeros((size, count, most), np.int32), np.zeros((size, count, most), bool)
        logps, weight = np.zeros((size, count, most), np.float32), np.zeros(size, np.float32)
        for row, responses in enumerate(made):
            for k, (ids, said) in enumerate(responses or ()):
                tokens[row, k, : len(ids)], mask[row, k, : len(ids)] = ids, True
                if said is not None:
                    logps[row, k, : len(ids)] = said
            weight[row] = responses is not None

        def split(x: np.ndarray) -> Any:
            return self.put(x.reshape(-1, self.rows, *x.shape[1:]))

        responses = Responses(
            tokens=split(tokens),
            mask=split(mask),
            weight=split(weight),
            sampler=split(logps) if isinstance(self.config.online, OnlinePairs) else None,
        )
        group = replace(group, responses=responses, views=(tuple(range(count)),))
        records = tuple(
            None if each is None else replace(self.records[i], responses=tuple(r.ids for r in each))
            for i, each in zip(batch.records, made, strict=True)
        )
        shape = dataclasses.replace(batch.shape, response=most)
        host = HostBatch(batch.step, None, batch.records, shape)  # type: ignore[arg-type]
        facts = {"groups_used": (float(weight.sum()), len(batch.records)), **facts}
        return Trainable(group, host, records, facts, example)

    def broken(self, batch: HostBatch, rows: Sequence[int]) -> Facts:
        """What is told of rows for which the policy's logits were not finite; they are to weigh 0. Raises
        NotFinite where the config says to stop there."""
        if rows and self.config.nonfinite == "stop":
            ids = [self.records[batch.records[row]].record.id for row in rows]
            what = f"step {batch.step + 1}: logits of the policy's own responses are"
            remedy = "look at the model, or leave such groups out: --nonfinite skip"
            raise not_finite(what, ids, len(batch.records), remedy)
        return {"rollout/nonfinite": (float(len(rows)), float(len(batch.records)))}
