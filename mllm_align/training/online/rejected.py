"""y~-: a rejected response that the policy makes against the chosen one of the data; no annotator."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from mllm_align.batch import PromptGroup
from mllm_align.config import Distorted, OnlineBDHS
from mllm_align.data.batches import HostBatch
from mllm_align.data.encode import Identical
from mllm_align.generate import bdhs
from mllm_align.generate.decode import Generator
from mllm_align.generate.rollout import distorted_program, features_program
from mllm_align.generate.sampling import random_key
from mllm_align.generate.similarity import open_similarity
from mllm_align.training.online.common import Common, Facts, Pending, Response, Trainable


class Rejected:
    """y~-, a rejected response by the current policy: by BDHS, or drawn along y+ under a noisy image."""

    ahead = False

    def __init__(self, common: Common, online: OnlineBDHS | Distorted):
        self.common, self.online = common, online
        self.eos_mask = common.encoder.eos_mask(common.bundle.config.decoder.vocab)
        if isinstance(online, OnlineBDHS):
            bdhs.check(common.records, common.encoder, online)
            similarity = open_similarity(online.similarity)
            self.generator = Generator(common.sampler.bundle, online.sampling, common.rows)
            self.maker = bdhs.BDHS(self.generator, common.encoder, online, similarity, seed=0)
            self.seen = features_program(*common.sampler.settings)
        else:
            self.program = distorted_program(*common.sampler.settings, online.noise_steps)

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Any, at: int) -> Pending:
        make = self._bdhs if isinstance(self.online, OnlineBDHS) else self._distorted
        return Pending(batch, group, batch.step, at, partial(make, batch, group, trained))

    def _distorted(self, batch: HostBatch, group: PromptGroup, trained: Any) -> tuple[list[Any], Facts]:
        keys = self.common.put(self.common.keys(batch, -2))
        arrays = [np.asarray(x) for x in self.program(self.common.bundle.params, trained, group, keys)]
        tokens, finite = (x.reshape(-1, *x.shape[2:]) for x in arrays)
        made = []
        for row, index in enumerate(batch.records):
            if not finite[row]:
                made.append(None)
                continue
            ids = tokens[row, : len(self.common.records[index].responses[0])]
            stop = np.flatnonzero(self.eos_mask[ids])  # a response ends at its first end of sequence
            made.append(ids[: stop[0] + 1] if len(stop) else ids)
        broken = [row for row in range(len(made)) if not finite[row]]
        return made, self.common.broken(batch, broken)

    def _bdhs(self, batch: HostBatch, group: PromptGroup, trained: Any) -> tuple[list[Any], Facts]:
        common, online = self.common, self.online
        assert isinstance(online, OnlineBDHS)
        self.maker.seed = int(random_key(common.config.seed, "bdhs", common.epoch(batch.step))[0])
        self.generator.trained = common.sampler.trained(trained)
        seen = None
        if online.distortion == "attention":  # noise is put on the pixels themselves, in every try
            seen = self._features(batch, group)
        made = {each.index: each for each in self.maker([common.records[i] for i in batch.records], seen)}
        tries = [made[common.records[i].index] for i in batch.records]
        good, broken = [m for m in tries if not m.broken], [row for row, m in enumerate(tries) if m.broken]
        facts = {
            "bdhs/iterations": (float(sum(m.iterations for m in good)), float(len(good))),
            "bdhs/similarity": (float(sum(m.similarity[-1] for m in good)), float(len(good))),
            "bdhs/unfinished": (float(sum(m.unfinished > 0 for m in good)), float(len(good))),
            **common.broken(batch, broken),
        }
        return [self._encoded(i, m.rejected) for i, m in zip(batch.records, tries, strict=True)], facts

    def _features(self, batch: HostBatch, group: PromptGroup) -> dict[int, np.ndarray]:
        """What the tower says of the batch's images, by record: their pixels are on the devices already."""
        common, per_tile = self.common, self.common.bundle.config.vision.tokens
        tiles, seen = common.sampler.batch(group).prefix.pixels, {}
        for micro in range(-(-len(batch.records) // common.rows)):
            part = batch.records[micro * common.rows : (micro + 1) * common.rows]
            params = common.sampler.bundle.params
            found = np.asarray(self.seen(params, self.generator.trained, tiles, np.int32(micro)))
            for record, row in zip((common.records[i] for i in part), found, strict=False):
                seen[record.index] = row[: record.shape.tiles * per_tile]
        return seen

    def _encoded(self, index: int, text: str) -> np.ndarray | None:
        """Ids of a made response; None if it says nothing or the same, is too long or changes the prompt's
        tokens."""
        encoded = self.common.records[index]
        if not text.strip():
            return None
        both = replace(encoded.record, responses=(encoded.record.responses[0], text))
        try:
            prefix, (_, ids) = self.common.encoder.tokens(both, 2)
        except Identical:
            return None
        length = encoded.shape.prefix + max(len(encoded.responses[0]), len(ids))
        good = np.array_equal(prefix, encoded.prefix) and length <= self.common.limit
        return ids if good else None

    def finish(self, pending: Pending) -> Trainable:
        common, batch = self.common, pending.batch
        began = time.perf_counter()
        rejected, facts = pending.ready()
        seconds = time.perf_counter() - began
        made: list[tuple[Response, ...] | None] = []
        usable = 0
        for index, ids in zip(batch.records, rejected, strict=True):
            given = common.records[index].responses
            responses = tuple(Response(r) for r in given)
            if ids is not None and not np.array_equal(ids, given[0]):
                usable += 1
                made.append((*responses, Response(ids)))
            else:  # the averaged loss goes on with the pair of the data
                made.append(responses if len(responses) > 1 else None)
        sizes = count(batch.shape.response, -(-batch.shape.response // 16) * 8)
        facts |= {"rejected_usable": (usable, len(rejected)), "rollout/seconds": (seconds, 1.0)}
        record, text = common.records[batch.records[0]].record, common.encoder.text
        written = None if rejected[0] is None else text(rejected[0]).strip()
        example = {"id": record.id, "responses": [record.responses[0], written]}
        return common.filled(batch, pending.group, made, sizes, facts, example)

    def close(self) -> None:
        pass
