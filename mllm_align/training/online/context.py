"""What every maker of responses knows of its run, and how responses get into a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mllm_align.batch import PromptGroup, Responses
from mllm_align.config import Config, Online
from mllm_align.data.batches import HostBatch
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.data.segments import changed_tokens
from mllm_align.errors import not_finite
from mllm_align.generation.sampling import random_key
from mllm_align.models.bundle import Bundle
from mllm_align.sharding import assemble, batch_sharding, local_rows
from mllm_align.training.online.maker import HostMetrics, TrainBatch
from mllm_align.training.online.sampler import Sampler


@dataclass(frozen=True)
class Response:
    """ids: end of sequence included. logps: nats per token, where the policy sampled it."""

    ids: np.ndarray
    logps: np.ndarray | None = None


class RunContext:
    """The run's config, base, records and folder, the keys of random numbers, and the policy that samples.

    Shapes: M micro-batches of B rows, K responses, R response tokens.
    """

    def __init__(
        self,
        config: Config,
        online: Online,
        bundle: Bundle,
        encoder: Encoder,
        records: Sequence[Encoded],
        out: Path,
    ):
        self.config, self.bundle, self.encoder, self.records, self.out = (
            config,
            bundle,
            encoder,
            records,
            out,
        )
        self.rows = config.rows_per_micro
        self.local_rows = local_rows(bundle.mesh, self.rows)
        self.max_length = config.data.max_length or bundle.config.decoder.max_length
        self.eos_mask = encoder.eos_mask(bundle.config.decoder.vocab)
        self.sampler = Sampler(config, bundle, online.mesh)

    def epoch(self, step: int) -> int:
        return step // -(-len(self.records) // self.config.batch_size)

    def key(self, index: int, step: int, *sample: int) -> np.ndarray:
        """[2] uint32: of a record in this pass over the data, whatever batch it is in."""
        return random_key(self.config.seed, self.records[index].record.id, self.epoch(step), *sample)

    def keys(self, batch: HostBatch, *sample: int) -> np.ndarray:
        """[M, B, 2]; rows that only fill the batch take those of the first."""
        fillers = self.config.batch_size - len(batch.records)
        indices = [*batch.records, *[batch.records[0]] * fillers]
        keys = np.stack([self.key(i, batch.step, *sample) for i in indices])
        return keys.reshape(-1, self.rows, 2)

    def to_devices(self, array: np.ndarray) -> jax.Array:
        """[M, B, ...] on the host of every process -> the devices."""
        return assemble(array[:, self.local_rows], batch_sharding(self.bundle.mesh), self.rows)

    def train_batch(
        self,
        batch: HostBatch,
        group: PromptGroup,
        made: Sequence[tuple[Response, ...] | None],
        padded: Callable[[int], int],
        metrics: HostMetrics,
        example: dict[str, Any] | None = None,
        sampler: bool = False,
    ) -> TrainBatch:
        """The batch with these responses in place.

        made: for each record up to K responses, as many as the objective compares, or None. padded: the
        length to pad responses to, from the longest one. sampler: with the log-probs of the sampler.
        """
        longest = max((len(r.ids) for responses in made for r in responses or ()), default=1)
        size, count, length = self.config.batch_size, self.config.objective.responses, padded(longest)
        tokens, mask = np.zeros((size, count, length), np.int32), np.zeros((size, count, length), bool)
        logps, weight = np.zeros((size, count, length), np.float32), np.zeros(size, np.float32)
        for row, responses in enumerate(made):
            for k, response in enumerate(responses or ()):
                real = row, k, slice(len(response.ids))
                tokens[real], mask[real] = response.ids, True
                if response.logps is not None:
                    logps[real] = response.logps
            weight[row] = responses is not None

        def split(x: np.ndarray) -> jax.Array:
            return self.to_devices(x.reshape(-1, self.rows, *x.shape[1:]))

        filled = Responses(
            tokens=split(tokens),
            mask=split(mask),
            weight=split(weight),
            sampler=split(logps) if sampler else None,
        )
        if "changes" in self.config.objective.needs:
            filled = replace(filled, changed=split(changed_tokens(tokens, mask)))
        records = tuple(
            None if each is None else self.records[i].answered(tuple(r.ids for r in each))
            for i, each in zip(batch.records, made, strict=True)
        )
        return TrainBatch(
            group=replace(group, responses=filled, views=self.config.objective.views),
            step=batch.step,
            indices=batch.records,
            shape=replace(batch.shape, response=length),
            records=records,
            metrics={"groups_used": (float(weight.sum()), len(batch.records)), **metrics},
            example=example,
        )

    def nonfinite(self, batch: HostBatch, rows: Sequence[int]) -> HostMetrics:
        """The metric of rows for which the policy's logits were not finite; they are to weigh 0. Raises
        NotFinite where the config says to stop there."""
        if rows and self.config.nonfinite == "stop":
            ids = [self.records[batch.records[row]].record.id for row in rows]
            what = f"step {batch.step + 1}: logits of the policy's own responses are"
            remedy = "look at the model, or leave such groups out: --nonfinite skip"
            raise not_finite(what, ids, len(batch.records), remedy)
        return {"rollout/nonfinite": (float(len(rows)), float(len(batch.records)))}
