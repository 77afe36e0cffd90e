"""Online-DPO and mixed-DPO: samples of the policy, ranked by an annotator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mllm_align import processes
from mllm_align.annotate.factory import open_annotator
from mllm_align.annotate.verdict import OUTCOMES, Question, Verdict, counted, rank
from mllm_align.batch import PromptGroup
from mllm_align.config import OnlinePairs
from mllm_align.data.batches import HostBatch
from mllm_align.generate.rollout import Rollout, pick_program, rollout_program
from mllm_align.sharding import assemble, batch_sharding, local_rows, replicated
from mllm_align.training.online.common import Common, Facts, Pending, Response, Trainable


class Pairs:
    """Online-DPO and mixed-DPO: K samples from the policy, the best and the worst by an annotator."""

    def __init__(self, common: Common, online: OnlinePairs, out: Path):
        self.common, self.online, self.ahead = common, online, online.stale
        records = [each.record for each in common.records]
        self.annotator = open_annotator(
            online.annotator, common.bundle, out / "answers", common.config.data, records=records
        )
        sampling = online.sampling
        self.rollout = rollout_program(*common.sampler.settings, sampling)
        self.pick = pick_program(common.bundle.mesh)
        eos_mask = common.encoder.eos_mask(common.bundle.config.decoder.vocab)
        self.eos_mask = eos_mask
        self.stops = assemble(eos_mask, replicated(common.sampler.bundle.mesh))
        self.pool = ThreadPoolExecutor(1)

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Any, at: int) -> Pending:
        """Dispatch the rollouts; their annotation follows in the background, if the config allows it."""
        pending = Pending(batch, group, batch.step, at)
        began, rows = time.perf_counter(), self._online_rows(batch)
        rollout = self._roll(batch, group, trained, rows) if rows else None
        work = partial(self._annotated, batch, rows, rollout, began)
        pending.ready = self.pool.submit(work) if self.ahead else work
        return pending

    def _online_rows(self, batch: HostBatch) -> list[int]:
        """Rows whose responses the policy makes: where alpha ~ Bernoulli(offline_share) is 0."""
        return [
            row
            for row, index in enumerate(batch.records)
            if np.random.default_rng(self.common.key(index, batch.step, -1)).random()
            >= self.online.offline_share
        ]

    def _roll(self, batch: HostBatch, group: PromptGroup, trained: Any, rows: list[int]) -> Rollout:
        """Samples for some rows, in parts of as many as a micro-batch has, or fewer if there are fewer."""
        common, count, sampler = self.common, self.online.samples, self.common.sampler
        step = max(common.rows // 4 // sampler.step, 1) * sampler.step  # few sizes: few programs
        size = min(-(-len(rows) // step) * step, common.rows)
        parts = -(-len(rows) // size)
        filled = np.array([*rows, *[rows[0]] * (parts * size - len(rows))], np.int32).reshape(parts, size)
        if len(batch.records) > len(rows) or parts * size < common.config.batch_size:
            everywhere = replicated(common.bundle.mesh)
            place = assemble((filled // common.rows, filled % common.rows), everywhere)
            group = self.pick(group, *place)
        keys = np.stack(
            [
                [common.key(batch.records[row], batch.step, k) for k in range(count)]
                for row in filled.reshape(-1)
            ]
        ).reshape(parts, size, count, 2)
        mesh = sampler.bundle.mesh
        held = local_rows(mesh, size)
        keys = assemble(keys[:, held], batch_sharding(mesh), size, held)
        policy = sampler.policy(trained)
        return self.rollout(policy.params, policy.trained, sampler.batch(group), keys, self.stops)

    def _annotated(
        self, batch: HostBatch, rows: list[int], rollout: Rollout | None, began: float
    ) -> dict[str, Any]:
        """Samples on the host, and the verdicts on those that this process asks about. broken: rows where
        logits of some sample are not finite; nothing is asked about them."""
        if rollout is None:
            return {"rows": [], "broken": [], "samples": [], "verdicts": {}, "seconds": (0.0, 0.0)}
        arrays = [np.asarray(x) for x in rollout]
        taken = time.perf_counter()
        tokens, lengths, logps, finite = (x.reshape(-1, *x.shape[2:]) for x in arrays)
        good = [bool(each.all()) for each in finite]
        samples = [
            [Response(tokens[i, k, :n], logps[i, k, :n]) for k, n in enumerate(lengths[i])]
            for i in range(len(rows))
            if good[i]
        ]
        broken = [row for i, row in enumerate(rows) if not good[i]]
        rows = [row for i, row in enumerate(rows) if good[i]]
        mine = range(len(rows))
        if not self.annotator.everywhere:
            mine = mine[jax.process_index() :: jax.process_count()]
        text = self.common.encoder.text
        questions = [
            Question(
                self.common.records[batch.records[rows[i]]].record,
                tuple(text(s.ids).strip() for s in samples[i]),
            )
            for i in mine
        ]
        verdicts = rank(self.annotator, questions)
        seconds = taken - began, time.perf_counter() - taken
        said = {i: dataclasses.asdict(v) for i, v in zip(mine, verdicts, strict=True)}
        made = {"rows": rows, "broken": broken, "samples": samples}
        return {**made, "verdicts": said, "seconds": seconds}

    def _gathered(self, pending: Pending) -> dict[str, Any]:
        """The result of `_annotated` with the verdicts of all processes; waits for it."""
        if not isinstance(pending.ready, dict):
            ready, made = pending.ready, {}

            def verdicts() -> dict[str, Any]:
                made.update(ready.result() if isinstance(ready, Future) else ready())
                return {str(i): v for i, v in made["verdicts"].items()}

            everyone = processes.gathered(verdicts)
            said = {int(i): v for one in everyone for i, v in one.items()}
            pending.ready = {**made, "verdicts": said}
        return pending.ready

    def finish(self, pending: Pending) -> Trainable:
        batch, common = pending.batch, self.common
        result = self._gathered(pending)
        samples: list[list[Response]] = result["samples"]
        verdicts = [
            Verdict(**{**result["verdicts"][i], "scores": tuple(result["verdicts"][i]["scores"])})
            for i in range(len(samples))
        ]
        made: list[tuple[Response, ...] | None] = [
            tuple(Response(ids) for ids in common.records[i].responses) or None for i in batch.records
        ]
        for row, each, verdict in zip(result["rows"], samples, verdicts, strict=True):
            pair = verdict.pair
            made[row] = None if pair is None else (each[pair[0]], each[pair[1]])
        for row in result["broken"]:
            made[row] = None
        facts = self._facts(pending, samples, verdicts) | common.broken(batch, result["broken"])
        example = self._example(batch, result["rows"], samples, verdicts)
        return common.filled(batch, pending.group, made, self._sizes(batch), facts, example)

    def _example(
        self, batch: HostBatch, rows: list[int], samples: list[list[Response]], verdicts: list[Verdict]
    ) -> dict[str, Any] | None:
        if not rows:
            return None
        verdict, text = verdicts[0], self.common.encoder.text
        return {
            "id": self.common.records[batch.records[rows[0]]].record.id,
            "responses": [text(each.ids).strip() for each in samples[0]],
            "outcome": verdict.outcome,
            "scores": list(verdict.scores) or None,
            "reason": verdict.reason,
        }

    def _sizes(self, batch: HostBatch) -> list[int]:
        """Response tokens that the batch may be padded to."""
        most = max(self.online.sampling.max_tokens, batch.shape.response)
        return [-(-most * part // 32) * 8 for part in (1, 2, 4)]

    def _facts(
        self, pending: Pending, samples: Sequence[Sequence[Response]], verdicts: Sequence[Verdict]
    ) -> Facts:
        flat = [s for each in samples for s in each]
        tokens, asked = float(sum(len(s.ids) for s in flat)), len(verdicts)
        open_ended = float(sum(not self.eos_mask[s.ids[-1]] for s in flat))
        rolled, annotated = pending.ready["seconds"]
        outcomes = counted(verdicts)
        first, parsed = (float(sum(getattr(v, n) for v in verdicts)) for n in ("first", "parsed"))
        return {
            "online_share": (asked + len(pending.ready["broken"]), len(pending.batch.records)),
            "staleness": (pending.step - pending.made_at, 1.0),
            "rollout/tokens": (tokens, len(flat)),
            "rollout/unfinished": (open_ended, len(flat)),
            "rollout/tokens_per_second": (tokens, rolled),
            "rollout/seconds": (rolled, 1.0),
            "annotate/seconds": (annotated, 1.0),
            **{f"annotate/{name}": (outcomes[name], asked) for name in OUTCOMES},
            "annotate/first": (first, parsed),
        }

    def saved(self, pending: Pending) -> Any:
        """What a checkpoint needs of a batch that was begun, as JSON values."""
        result = self._gathered(pending)
        samples = [[[s.ids.tolist(), s.logps.tolist()] for s in each] for each in result["samples"]]  # type: ignore[union-attr]
        verdicts = [result["verdicts"][i] for i in range(len(samples))]
        return {
            "step": pending.step,
            "made_at": pending.made_at,
            "rows": result["rows"],
            "broken": result["broken"],
            "samples": samples,
            "verdicts": verdicts,
            "seconds": list(result["seconds"]),
        }

    def restored(self, saved: Any, batch: HostBatch, group: PromptGroup) -> Pending:
        samples = [
            [Response(np.array(ids, np.int32), np.array(logps, np.float32)) for ids, logps in each]
            for each in saved["samples"]
        ]
        ready = {
            "rows": saved["rows"],
            "broken": saved.get("broken", []),
            "samples": samples,
            "verdicts": dict(enumerate(saved["verdicts"])),
            "seconds": saved["seconds"],
        }
        return Pending(batch, group, saved["step"], saved["made_at"], ready)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
