"""Samples of the policy, scored by an annotator: the source of online-DPO and mixed-DPO."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from mllm_align import processes
from mllm_align.annotate.factory import Context, open_annotator
from mllm_align.annotate.verdict import OUTCOMES, Question, Verdict, counted, rank
from mllm_align.batch import PromptGroup
from mllm_align.config import OnlinePairs, OnlineRewards
from mllm_align.data.batches import HostBatch
from mllm_align.generation.rollout import Rollout, pick_program, rollout_program
from mllm_align.sharding import assemble, batch_sharding, local_rows, replicated
from mllm_align.sizes import binary_fraction, rows_of_part
from mllm_align.training.online.context import Response, RunContext
from mllm_align.training.online.maker import (
    HostMetrics,
    InFlight,
    Maker,
    MakerState,
    TrainBatch,
    Tree,
)


@dataclass(frozen=True)
class Samples:
    """K scored responses to each of a batch's B prompts, on the host.

    sampled [B] bool: prompts that the policy responded to. Of the others the arrays hold zeros.
    tokens [B, K, R] int32, lengths [B, K] int32: an end of sequence included; zeros after it.
    logps [B, K, R] float32: nats per token of the policy that sampled, before temperature and filters.
    finite [B, K] bool: whether all logits are that the tokens were drawn from.
    verdicts: the annotator's, of the prompts whose samples are all finite; None for the others.
    seconds: of sampling, of annotation.
    """

    sampled: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    logps: np.ndarray
    finite: np.ndarray
    verdicts: tuple[Verdict | None, ...]
    seconds: tuple[float, float]

    @classmethod
    def none(cls, rows: int, samples: int, tokens: int) -> Samples:
        """Of a batch whose responses all come with the data."""
        ids, flags = np.zeros((rows, samples, tokens), np.int32), np.zeros((rows, samples), bool)
        logps, lengths = ids.astype(np.float32), flags.astype(np.int32)
        return cls(np.zeros(rows, bool), ids, lengths, logps, flags, (None,) * rows, (0.0, 0.0))

    @property
    def broken(self) -> list[int]:
        """Rows with logits that are not finite."""
        return np.flatnonzero(self.sampled & ~self.finite.all(1)).tolist()

    @property
    def usable(self) -> list[int]:
        """Rows whose samples are all finite: those that the annotator is asked about."""
        return np.flatnonzero(self.sampled & self.finite.all(1)).tolist()

    def responses(self, row: int) -> tuple[Response, ...]:
        """The K samples of a prompt."""
        each = zip(self.tokens[row], self.logps[row], self.lengths[row], strict=True)
        return tuple(Response(tokens[:n], logps[:n]) for tokens, logps, n in each)


ARRAYS = ("sampled", "tokens", "lengths", "logps", "finite")


@dataclass
class Rolling(InFlight):
    """made_at: updates of the policy that samples. local: waits for the samples, with the verdicts that
    this process asks for. samples: with those of all processes, once they are known."""

    made_at: int
    local: Callable[[], Samples]
    samples: Samples | None = None


class Rollouts(Maker[Rolling]):
    """K samples of the policy for each prompt, scored. Subclasses make a batch of them (`finish`)."""

    def __init__(self, context: RunContext, online: OnlinePairs | OnlineRewards):
        self.context, self.online = context, online
        self.ahead, self.on_policy = online.stale, not online.stale
        records = [each.record for each in context.records]
        folder, data = context.out / "answers", context.config.data
        given = Context(context.bundle, folder, data, records=records)
        self.annotator = open_annotator(online.annotator, given)
        self.rollout = rollout_program(*context.sampler.settings, online.sampling)
        self.pick = pick_program(context.bundle.mesh)
        self.count = (
            online.samples if isinstance(online, OnlinePairs) else context.config.objective.responses
        )
        self.stop_mask = assemble(context.eos_mask, replicated(context.sampler.bundle.mesh))
        self.pool = ThreadPoolExecutor(1)

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Tree, step: int) -> Rolling:
        """Dispatch the rollouts; their annotation follows in the background, if the config allows it."""
        began, rows = time.perf_counter(), self._online_rows(batch)
        rollout = self._roll(batch, group, trained, rows) if rows else None
        work = partial(self._annotated, batch, rows, rollout, began)
        return Rolling(batch, group, step, self.pool.submit(work).result if self.ahead else work)

    def _online_rows(self, batch: HostBatch) -> list[int]:
        """Rows whose responses the policy makes: where alpha ~ Bernoulli(offline_share) is 0."""
        return [
            row
            for row, index in enumerate(batch.records)
            if np.random.default_rng(self.context.key(index, batch.step, -1)).random()
            >= self.online.offline_share
        ]

    def _roll(self, batch: HostBatch, group: PromptGroup, trained: Tree, rows: list[int]) -> Rollout:
        """Samples for some rows, in parts of as many as a micro-batch has, or fewer if there are fewer."""
        context, count, sampler = self.context, self.count, self.context.sampler
        size = rows_of_part(len(rows), context.rows, sampler.step)
        parts = -(-len(rows) // size)
        filled = np.array([*rows, *[rows[0]] * (parts * size - len(rows))], np.int32).reshape(parts, size)
        if len(batch.records) > len(rows) or parts * size < context.config.batch_size:
            everywhere = replicated(context.bundle.mesh)
            places = assemble((filled // context.rows, filled % context.rows), everywhere)
            group = self.pick(group, *places)
        keys = np.stack(
            [
                [context.key(batch.records[row], batch.step, k) for k in range(count)]
                for row in filled.reshape(-1)
            ]
        ).reshape(parts, size, count, 2)
        mesh = sampler.bundle.mesh
        keys = assemble(keys[:, local_rows(mesh, size)], batch_sharding(mesh), size)
        policy = sampler.policy(trained)
        return self.rollout(policy.params, policy.trained, sampler.batch(group), keys, self.stop_mask)

    def _annotated(
        self, batch: HostBatch, rows: list[int], rollout: Rollout | None, began: float
    ) -> Samples:
        """Samples on the host, and the verdicts on those that this process asks about."""
        samples = Samples.none(len(batch.records), self.count, self.online.sampling.max_tokens)
        if rollout is None:
            return samples
        samples.sampled[rows] = True
        for name in ARRAYS[1:]:
            made = np.asarray(getattr(rollout, name))  # [parts, rows of a part, ...]; waits for the devices
            getattr(samples, name)[rows] = made.reshape(-1, *made.shape[2:])[: len(rows)]
        sampled = time.perf_counter()
        mine = samples.usable
        if not self.online.annotator.on_devices:
            mine = mine[jax.process_index() :: jax.process_count()]
        questions = [
            Question(self.context.records[batch.records[row]].record, self._texts(samples, row))
            for row in mine
        ]
        verdicts = dict(zip(mine, self._verdicts(questions), strict=True))
        return replace(
            samples,
            verdicts=tuple(map(verdicts.get, range(len(batch.records)))),
            seconds=(sampled - began, time.perf_counter() - sampled),
        )

    def _verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        return rank(self.annotator, questions)

    def _texts(self, samples: Samples, row: int) -> tuple[str, ...]:
        return tuple(self.context.encoder.text(each.ids).strip() for each in samples.responses(row))

    def samples(self, pending: Rolling) -> Samples:
        """The samples with the verdicts of all processes; waits for them. An InputError of one process is
        raised on all."""
        if pending.samples is None:
            local: list[Samples] = []

            def verdicts() -> list[dict[str, Any] | None]:
                local.append(pending.local())
                return _verdicts_to_json(local[0].verdicts)

            each_process = processes.gathered(verdicts)
            merged = [next(filter(None, each), None) for each in zip(*each_process, strict=True)]
            pending.samples = replace(local[0], verdicts=_verdicts_from_json(merged))
        return pending.samples

    def metrics(self, pending: Rolling) -> HostMetrics:
        """Raises NotFinite where the config says to stop at logits that are not finite."""
        batch, samples = pending.batch, self.samples(pending)
        lengths = samples.lengths[samples.usable]
        last = np.take_along_axis(samples.tokens[samples.usable], lengths[..., None] - 1, axis=2)
        tokens, unfinished = float(lengths.sum()), float((~self.context.eos_mask[last]).sum())
        verdicts = [verdict for verdict in samples.verdicts if verdict is not None]
        outcomes, (rollout, annotation) = counted(verdicts), samples.seconds
        first, parsed = (float(sum(getattr(v, name) for v in verdicts)) for name in ("first", "parsed"))
        return {
            "online_share": (int(samples.sampled.sum()), len(batch.records)),
            "staleness": (batch.step - pending.made_at, 1.0),
            "rollout/tokens": (tokens, lengths.size),
            "rollout/unfinished": (unfinished, lengths.size),
            "rollout/tokens_per_second": (tokens, rollout),
            "rollout/seconds": (rollout, 1.0),
            "annotate/seconds": (annotation, 1.0),
            **{f"annotate/{name}": (outcomes[name], len(verdicts)) for name in OUTCOMES},
            "annotate/first": (first, parsed),
            **self.context.nonfinite(batch, samples.broken),
        }

    def example(self, pending: Rolling) -> dict[str, Any] | None:
        """What the policy wrote for the first prompt, and what the annotator says of it."""
        samples = self.samples(pending)
        if not samples.usable:
            return None
        row = samples.usable[0]
        verdict = samples.verdicts[row]
        assert verdict is not None
        return {
            "id": self.context.records[pending.batch.records[row]].record.id,
            "responses": list(self._texts(samples, row)),
            "outcome": verdict.outcome,
            "scores": list(verdict.scores) or None,
            "reason": verdict.reason,
        }

    def saved(self, round: Sequence[Rolling]) -> MakerState | None:
        if not round:
            return None
        (pending,) = round
        samples = self.samples(pending)
        metadata = {
            "step": pending.batch.step,
            "made_at": pending.made_at,
            "verdicts": _verdicts_to_json(samples.verdicts),
            "seconds": list(samples.seconds),
        }
        return MakerState(metadata, {name: getattr(samples, name) for name in ARRAYS})

    def restored(
        self, state: MakerState, batches: Sequence[tuple[HostBatch, PromptGroup]]
    ) -> list[Rolling]:
        ((batch, group),), saved, arrays = batches, state.metadata, state.arrays
        if "samples" in saved:
            samples = self._from_lists(saved, len(batch.records))
        else:
            verdicts, seconds = _verdicts_from_json(saved["verdicts"]), tuple(saved["seconds"])
            samples = Samples(**arrays, verdicts=verdicts, seconds=seconds)
        return [Rolling(batch, group, saved["made_at"], lambda: samples, samples)]

    def _from_lists(self, saved: dict[str, Any], rows: int) -> Samples:
        """From a checkpoint of before samples were arrays: lists, of the rows with finite logits."""
        samples = Samples.none(rows, self.count, self.online.sampling.max_tokens)
        samples.sampled[[*saved["rows"], *saved.get("broken", [])]] = True
        verdicts: list[dict[str, Any] | None] = [None] * rows
        for row, each, verdict in zip(saved["rows"], saved["samples"], saved["verdicts"], strict=True):
            samples.finite[row], verdicts[row] = True, verdict
            for k, (ids, logps) in enumerate(each):
                samples.lengths[row, k] = len(ids)
                samples.tokens[row, k, : len(ids)], samples.logps[row, k, : len(ids)] = ids, logps
        return replace(samples, verdicts=_verdicts_from_json(verdicts), seconds=tuple(saved["seconds"]))

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


class BestAgainstWorst(Rollouts):
    """Online-DPO and mixed-DPO: the best and the worst of K samples, or the pair that the data keep."""

    def finish(self, pending: Rolling) -> TrainBatch:
        batch, samples = pending.batch, self.samples(pending)
        made = [self._pair(samples, row, index) for row, index in enumerate(batch.records)]
        limit = max(self.online.sampling.max_tokens, batch.shape.response)
        return self.context.train_batch(
            batch,
            pending.group,
            made,
            partial(binary_fraction, limit=limit),
            self.metrics(pending),
            self.example(pending),
            sampler=True,
        )

    def _pair(self, samples: Samples, row: int, index: int) -> tuple[Response, ...] | None:
        if not samples.sampled[row]:
            return tuple(Response(ids) for ids in self.context.records[index].responses)
        verdict = samples.verdicts[row]
        if verdict is None or verdict.pair is None:
            return None
        best, worst = verdict.pair
        responses = samples.responses(row)
        return responses[best], responses[worst]


def _verdicts_to_json(verdicts: Sequence[Verdict | None]) -> list[dict[str, Any] | None]:
    return [None if verdict is None else asdict(verdict) for verdict in verdicts]


def _verdicts_from_json(values: Sequence[dict[str, Any] | None]) -> tuple[Verdict | None, ...]:
    return tuple(None if each is None else Verdict.from_json(each) for each in values)
