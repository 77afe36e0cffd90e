"""y~-: a rejected response that the policy makes against the chosen one of the data; no annotator."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mllm_align.batch import PromptGroup
from mllm_align.config import Distorted, OnlineBDHS
from mllm_align.data.batches import HostBatch
from mllm_align.data.encode import Identical
from mllm_align.generation import bdhs
from mllm_align.generation.decode import Generator
from mllm_align.generation.rollout import distorted_program, features_program
from mllm_align.generation.sampling import random_key
from mllm_align.generation.similarity import open_similarity
from mllm_align.sizes import half_steps
from mllm_align.training.online.context import Response, RunContext
from mllm_align.training.online.maker import HostMetrics, InFlight, Maker, TrainBatch, Tree

Made = tuple[list[np.ndarray | None], HostMetrics]
"""Ids of a rejected response for each record of a batch, None where no usable one came, and metrics."""


@dataclass
class Deferred(InFlight):
    """A batch and the policy that makes its responses, once they are wanted."""

    trained: Tree


class Rejected(Maker[Deferred]):
    """A rejected response by the current policy for each record; subclasses say how."""

    context: RunContext

    def make(self, batch: HostBatch, group: PromptGroup, trained: Tree) -> Made:
        raise NotImplementedError

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Tree, step: int) -> Deferred:
        return Deferred(batch, group, trained)

    def finish(self, pending: Deferred) -> TrainBatch:
        context, batch = self.context, pending.batch
        began = time.perf_counter()
        rejected, metrics = self.make(batch, pending.group, pending.trained)
        seconds = time.perf_counter() - began
        made: list[tuple[Response, ...] | None] = []
        usable = 0
        for index, ids in zip(batch.records, rejected, strict=True):
            given = context.records[index].responses
            responses = tuple(Response(r) for r in given)
            if ids is not None and not np.array_equal(ids, given[0]):
                usable += 1
                made.append((*responses, Response(ids)))
            else:  # the averaged loss goes on with the pair of the data
                made.append(responses if len(responses) > 1 else None)
        metrics |= {"rejected_usable": (usable, len(rejected)), "rollout/seconds": (seconds, 1.0)}
        record, first = context.records[batch.records[0]].record, rejected[0]
        written = None if first is None else context.encoder.text(first).strip()
        example = {"id": record.id, "responses": [record.responses[0], written]}
        padded = partial(half_steps, usual=batch.shape.response)
        return context.train_batch(batch, pending.group, made, padded, metrics, example)


class RejectedByNoise(Rejected):
    """Drawn token by token along y+ under a noisy image."""

    def __init__(self, context: RunContext, online: Distorted):
        self.context = context
        self.program = distorted_program(*context.sampler.settings, online.noise_steps)

    def make(self, batch: HostBatch, group: PromptGroup, trained: Tree) -> Made:
        context = self.context
        keys = context.to_devices(context.keys(batch, -2))
        arrays = [np.asarray(x) for x in self.program(context.bundle.params, trained, group, keys)]
        tokens, finite = (x.reshape(-1, *x.shape[2:]) for x in arrays)
        made: list[np.ndarray | None] = []
        for row, index in enumerate(batch.records):
            ids = tokens[row, : len(context.records[index].responses[0])]
            stop = np.flatnonzero(context.eos_mask[ids])  # a response ends at its first end of sequence
            ids = ids[: stop[0] + 1] if len(stop) else ids
            made.append(ids if finite[row] else None)
        return made, context.nonfinite(batch, [row for row in range(len(made)) if not finite[row]])


class RejectedByBDHS(Rejected):
    """By bias-driven hallucination sampling (arXiv 2407.02477, section 4)."""

    def __init__(self, context: RunContext, online: OnlineBDHS):
        self.context, self.online = context, online
        bdhs.check(context.records, context.encoder, online, context.max_length)
        similarity = open_similarity(online.similarity)
        self.decoder = Generator(context.sampler.bundle, online.sampling, context.rows)
        self.bdhs = bdhs.BDHS(self.decoder, context.encoder, online, similarity, seed=0)
        self.features = features_program(*context.sampler.settings)

    def make(self, batch: HostBatch, group: PromptGroup, trained: Tree) -> Made:
        context = self.context
        self.bdhs.seed = int(random_key(context.config.seed, "bdhs", context.epoch(batch.step))[0])
        self.decoder.trained = context.sampler.trained(trained)
        features = None
        if self.online.distortion == "attention":  # else they are made anew in every try
            features = self._features(batch, group)
        made = {
            each.index: each for each in self.bdhs([context.records[i] for i in batch.records], features)
        }
        tries = [made[context.records[i].index] for i in batch.records]
        good, broken = [m for m in tries if not m.broken], [row for row, m in enumerate(tries) if m.broken]
        metrics = {
            "bdhs/iterations": (float(sum(m.iterations for m in good)), float(len(good))),
            "bdhs/similarity": (float(sum(m.similarity[-1] for m in good)), float(len(good))),
            "bdhs/unfinished": (float(sum(m.unfinished > 0 for m in good)), float(len(good))),
            **context.nonfinite(batch, broken),
        }
        return [self._encoded(i, m.rejected) for i, m in zip(batch.records, tries, strict=True)], metrics

    def _features(self, batch: HostBatch, group: PromptGroup) -> dict[int, np.ndarray]:
        """The tower's features of each record's images, whose images are on the devices already."""
        context, per_tile = self.context, self.context.bundle.config.vision.tokens
        params, prefix = context.sampler.bundle.params, context.sampler.batch(group).prefix
        features = {}
        for micro, start in enumerate(range(0, len(batch.records), context.rows)):
            part = [context.records[i] for i in batch.records[start : start + context.rows]]
            rows = np.asarray(self.features(params, self.decoder.trained, prefix, np.int32(micro)))
            for record, row in zip(part, rows, strict=False):
                features[record.index] = row[: record.shape.tiles * per_tile]
        return features

    def _encoded(self, index: int, text: str) -> np.ndarray | None:
        """Ids of a made response; None if it is empty or the chosen one, is too long, or changes the
        prompt's tokens."""
        encoded = self.context.records[index]
        if not text.strip():
            return None
        both = replace(encoded.record, responses=(encoded.record.responses[0], text))
        try:
            prefix, (_, ids) = self.context.encoder.tokens(both, encoded.sizes, 2)
        except Identical:
            return None
        length = encoded.shape.prefix + max(len(encoded.responses[0]), len(ids))
        good = np.array_equal(prefix, encoded.prefix) and length <= self.context.max_length
        return ids if good else None
