"""Samples of the policy with a reward each: the rollouts that policy gradients learn from.

One update is taken on each rollout, so the policy that sampled is the policy that is updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_align.align import advantages
from mllm_align.align.policy_gradient import PolicyGradient
from mllm_align.annotate.verdict import Question, Verdict
from mllm_align.batch import PromptGroup
from mllm_align.config import OnlineRewards
from mllm_align.data.batches import HostBatch
from mllm_align.generation.rollout import each_part
from mllm_align.models.bundle import base_shardings, make_model
from mllm_align.models.config import ModelConfig
from mllm_align.models.policy import policy_variables, tower_is_trained
from mllm_align.models.vlm import cast, variables
from mllm_align.sharding import batch_sharding, replicated, traced_within
from mllm_align.sizes import binary_fraction
from mllm_align.training.online.maker import HostMetrics, TrainBatch, Tree
from mllm_align.training.online.rollouts import Rolling, Rollouts, Samples


@lru_cache(maxsize=8)
def forward_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any) -> Any:
    """Jitted forward(params, trained, batch) -> (policy, reference) [M, B, K, R] on every device: nats per
    token of the responses by the forward pass of training; 0 at padding."""
    model = make_model(config)

    def part(params: Any, trained: Any, group: PromptGroup) -> Any:
        policy = policy_variables(params, trained, lora_scale, dtype)
        frozen = variables(cast(params, dtype))
        pixels, given = group.prefix.pixels.astype(dtype), (group.prefix, group.responses)
        own = shared = model.apply(policy, pixels, method="features")
        if tower_is_trained(trained):
            shared = model.apply(frozen, pixels, method="features")
        return tuple(
            model.apply(each, features, *given, method="response_logps")
            for each, features in ((policy, own), (frozen, shared))
        )

    def forward(params: Any, trained: Any, batch: PromptGroup) -> Any:
        return each_part(partial(part, params, trained), batch)

    places = base_shardings(config, mesh), None, batch_sharding(mesh)
    return jax.jit(traced_within(mesh, forward, dtype), in_shardings=places, out_shardings=replicated(mesh))


@dataclass
class Rewarding(Rolling):
    """trained: the policy that samples; valid until the update."""

    trained: Tree | None = None


class Rewarded(Rollouts):
    """K samples of the policy for each prompt, with what an objective makes of their rewards."""

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Tree, step: int) -> Rewarding:
        begun = super().begin(batch, group, trained, step)
        return Rewarding(begun.batch, begun.group, begun.made_at, begun.local, trained=trained)

    def _verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Of all responses: an empty one has a reward, too, and so have two that are the same."""
        return self.annotator(questions) if questions else []

    def finish(self, pending: Rolling) -> TrainBatch:
        assert isinstance(pending, Rewarding)
        batch, samples, context = pending.batch, self.samples(pending), self.context
        rewards = self._rewards(samples)
        scored: np.ndarray = np.any(np.isfinite(rewards), axis=1)
        made = [samples.responses(row) if scored[row] else None for row in range(len(batch.records))]
        longest = partial(binary_fraction, limit=self.online.sampling.max_tokens)
        metrics = self.metrics(pending) | self._reward_metrics(rewards, samples)
        filled = context.train_batch(
            batch, pending.group, made, longest, metrics, self.example(pending), sampler=True
        )
        group = self._credited(filled.group, samples, rewards, pending.trained)
        return replace(filled, group=group)

    def _rewards(self, samples: Samples) -> np.ndarray:
        """[B, K] float64, as the annotator gave them; NaN where it gave none."""
        rewards = np.full(samples.lengths.shape, np.nan)
        for row, verdict in enumerate(samples.verdicts):
            if verdict is not None and verdict.scores:
                rewards[row] = verdict.scores
        return rewards

    def _credited(
        self, group: PromptGroup, samples: Samples, rewards: np.ndarray, trained: Any
    ) -> PromptGroup:
        """The group with log-probs of policy and reference and with what the objective makes of rewards."""
        context, online, responses = self.context, self.online, group.responses
        objective: Any = context.config.objective
        assert isinstance(objective, PolicyGradient) and isinstance(online, OnlineRewards)
        bundle = context.bundle
        forward = forward_program(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype)
        old, reference = forward(bundle.params, trained, group)
        logps = [x.reshape(-1, *x.shape[2:]) for x in jax.device_get((old, reference))]
        last = np.take_along_axis(samples.tokens, np.maximum(samples.lengths - 1, 0)[..., None], axis=2)
        shaped = advantages.scaled(rewards, online.reward_mean, online.reward_deviation)
        shaped = advantages.without_end(shaped, context.eos_mask[last[..., 0]], online.missing_end)
        whole = np.full(logps[0].shape[:2], np.nan)  # with the rows that only fill the batch
        whole[: len(rewards)] = shaped
        lengths = np.zeros(whole.shape, int)
        lengths[: len(rewards)] = np.where(np.isfinite(rewards).any(1, keepdims=True), samples.lengths, 0)
        mask = np.arange(logps[0].shape[-1]) < lengths[..., None]
        made = objective.credit(whole, mask, *logps)
        fields = {name: self._split(value) for name, value in made.items()}
        fields |= {"old": self._split(logps[0]), "reference": (self._split(logps[1]),)}
        return replace(group, responses=replace(responses, **fields))

    def _split(self, values: np.ndarray) -> jax.Array:
        whole = np.asarray(values, np.float32)
        return self.context.to_devices(whole.reshape(-1, self.context.rows, *whole.shape[1:]))

    def _reward_metrics(self, rewards: np.ndarray, samples: Samples) -> HostMetrics:
        """Of rewards as the annotator gave them, and how they go with the length of the response."""
        scored = np.isfinite(rewards)
        given, lengths = rewards[scored], samples.lengths[scored].astype(float)
        groups = rewards[np.all(scored, axis=1)]
        within = float(groups.std(1, ddof=1).sum()) if groups.size and groups.shape[1] > 1 else 0.0
        return {
            "reward": (float(given.sum()), float(given.size)),
            "reward/within_prompt": (within, float(len(groups))),
            "reward/unscored": (float((~scored).sum()), float(scored.size)),
            **_correlation(given, lengths),
        }


def _correlation(given: np.ndarray, lengths: np.ndarray) -> HostMetrics:
    """Pearson's, of rewards with lengths in tokens; none where either does not vary."""
    if given.size < 2 or not given.std() or not lengths.std():
        return {}
    return {"reward/length_correlation": (float(np.corrcoef(given, lengths)[0, 1]), 1.0)}
