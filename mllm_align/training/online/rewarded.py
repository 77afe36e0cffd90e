"""Samples of the policy with a reward each: the rollouts that policy gradients learn from.

A round responds to some batches of the data and scores the responses by the policy as it is then; the
updates that follow see arrays alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_align import processes
from mllm_align.align import advantages
from mllm_align.align.policy_gradient import PolicyGradient
from mllm_align.annotate.verdict import Question, Verdict
from mllm_align.batch import PromptGroup, with_responses
from mllm_align.config import OnlineRewards
from mllm_align.data.batches import HostBatch
from mllm_align.errors import InputError, refusal
from mllm_align.files import json_text, new_file, read_json
from mllm_align.generation.rollout import each_part
from mllm_align.models.bundle import base_shardings, make_model
from mllm_align.models.config import ModelConfig
from mllm_align.models.policy import SCORE, VALUE, image_features, policy_variables, tower_is_trained
from mllm_align.models.vlm import cast, variables
from mllm_align.sharding import batch_sharding, replicated, traced_within
from mllm_align.sizes import binary_fraction
from mllm_align.training.online.context import RunContext
from mllm_align.training.online.maker import BatchOf, HostMetrics, MakerState, TrainBatch, Tree
from mllm_align.training.online.rollouts import ARRAYS, Rolling, Rollouts, Samples

SCALE = "reward_scale.json"


@lru_cache(maxsize=8)
def forward_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any) -> Any:
    """Jitted forward(params, trained, batch) -> {"old", "reference", and of a policy with a value model
    "values"} [M, B, K, R] on every device: by the forward pass of training, nats per token of the responses
    under the policy and the reference, and what the value model says of the state before the token; 0 at
    padding."""
    model = make_model(config)

    def part(params: Any, trained: Any, group: PromptGroup) -> Any:
        prefix, given = group.prefix, (group.prefix, group.responses)
        features = partial(image_features, model, prefix=prefix, dtype=dtype)
        policy = policy_variables(params, trained, lora_scale, dtype)
        frozen = variables(cast(params, dtype))
        own = features(policy)
        shared = features(frozen) if tower_is_trained(trained) else own
        found = {
            "old": model.apply(policy, own, *given, method="response_logps"),
            "reference": model.apply(frozen, shared, *given, method="response_logps"),
        }
        if (critic := trained.get(VALUE)) is not None:
            apart = policy_variables(params, critic, lora_scale, dtype)
            seen = features(apart) if tower_is_trained(critic) else shared
            head = critic[SCORE]["kernel"]
            found["values"] = model.apply(apart, seen, *given, head, method="values")
        return found

    def forward(params: Any, trained: Any, batch: PromptGroup) -> Any:
        return each_part(partial(part, params, trained), batch)

    places = base_shardings(config, mesh), None, batch_sharding(mesh)
    return jax.jit(traced_within(mesh, forward, dtype), in_shardings=places, out_shardings=replicated(mesh))


@dataclass
class Rewarding(Rolling):
    """trained: the policy that samples; valid until it is updated. credits: fields of its responses
    [N, K, R] float32 on the host, N rows of the batch; and made: the batch that the step takes, once the
    round is complete. told: whether its metrics were."""

    trained: Tree | None = None
    credits: dict[str, np.ndarray] | None = None
    made: TrainBatch | None = None
    told: bool = False


class Rewarded(Rollouts):
    """K samples of the policy for each prompt, with what an objective makes of their rewards."""

    def __init__(self, context: RunContext, online: OnlineRewards):
        super().__init__(context, online)
        self.settings = online
        self.scale = online.reward_mean, online.reward_deviation

    def start(self, trained: Tree, step: int, batch: BatchOf) -> None:
        """Measure the scale of rewards, if the config asks for it; a run that goes on reads it."""
        if not self.settings.reward_samples:
            return
        place = self.context.out / SCALE
        if step:
            self.scale = tuple(processes.on_first(lambda: _scale(place)))
            return
        self.scale, count = self._measured(trained, batch)
        mean, deviation = self.scale
        text = json_text({"mean": mean, "deviation": deviation, "samples": count}, indent=2) + "\n"
        processes.on_first(lambda: _write(place, text))
        processes.say(f"rewards of {count} responses: mean {mean:.4g}, deviation {deviation:.4g}")

    def _measured(self, trained: Tree, batch: BatchOf) -> tuple[tuple[float, float], int]:
        """(mean, deviation) and number of rewards of the first batches' responses."""
        wanted, number, found = self.settings.reward_samples, 0, np.zeros(0)
        while len(found) < wanted and number * self.context.config.batch_size * self.count < 2 * wanted:
            pending = self.begin(*batch(number), trained, 0)
            rewards = self._rewards(self.samples(pending))
            found, number = np.append(found, rewards[np.isfinite(rewards)]), number + 1
        found = found[:wanted]
        if len(found) < 2 or not found.std():
            problem = f"{len(found)} rewards, all the same" if len(found) else "no response has a reward"
            raise InputError(f"online.reward_samples: {problem}; see --online.annotator, or leave it out")
        return (float(found.mean()), float(found.std(ddof=1))), len(found)

    def begin(self, batch: HostBatch, group: PromptGroup, trained: Tree, step: int) -> Rewarding:
        begun = super().begin(batch, group, trained, step)
        if processes.several() and jax.default_backend() == "cpu":
            # CPU devices run programs side by side: collectives of one round's rollouts would mix
            samples = begun.local()
            begun.local = lambda: samples
        return Rewarding(begun.batch, begun.group, begun.made_at, begun.local, trained=trained)

    def _verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Of all responses: an empty one has a reward, too, and so have two that are the same."""
        return self.annotator(questions) if questions else []

    def complete(self, round: Sequence[Rewarding]) -> None:
        """Score the responses by the forward pass of training, and credit them, the whole round at once."""
        objective = self.context.config.objective
        assert isinstance(objective, PolicyGradient)
        filled = [self._filled(each) for each in round]
        found = [self._scored(each, batch.group) for each, batch in zip(round, filled, strict=True)]
        longest = max(each["old"].shape[-1] for each in found)

        def whole(parts: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([_padded(each, longest) for each in parts])

        seen = {name: whole([each[name] for each in found]) for name in found[0]}
        rewards, masks = zip(*map(self._scaled, round), strict=True)
        made = objective.credit(np.concatenate(rewards), whole(masks), **seen)
        if "returns" in made:
            share = advantages.explained_variance(seen["values"], made["returns"], whole(masks))
            if np.isfinite(share):
                filled[0].metrics["value/explained"] = share, 1.0
        start = 0
        for each, given, of_it in zip(round, filled, found, strict=True):
            rows, length = of_it["old"].shape[0], of_it["old"].shape[-1]
            credited = {name: x[start : start + rows, :, :length] for name, x in made.items()}
            each.credits = {name: np.asarray(x, np.float32) for name, x in (of_it | credited).items()}
            each.made, start = self._placed(given, each.credits), start + rows

    def _scored(self, pending: Rewarding, group: PromptGroup) -> dict[str, np.ndarray]:
        """What `forward_program` makes of a batch with its samples, on the host [N, K, R]."""
        bundle, trained, pending.trained = self.context.bundle, pending.trained, None
        forward = forward_program(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype)
        found = jax.device_get(forward(bundle.params, trained, group))
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in found.items()}

    def finish(self, pending: Rolling) -> TrainBatch:
        """A batch's metrics come with its first update alone."""
        assert isinstance(pending, Rewarding) and pending.made is not None
        made, pending.told, told = pending.made, True, pending.told
        return replace(made, metrics={}, example=None) if told else made

    def _filled(self, pending: Rewarding) -> TrainBatch:
        """The batch with its samples in place, of prompts with a reward."""
        batch, samples = pending.batch, self.samples(pending)
        rewards = self._rewards(samples)
        scored: np.ndarray = np.any(np.isfinite(rewards), axis=1)
        made = [samples.responses(row) if scored[row] else None for row in range(len(batch.records))]
        longest = partial(binary_fraction, limit=self.online.sampling.max_tokens)
        metrics = self.metrics(pending) | self._reward_metrics(rewards, samples)
        example = self.example(pending)
        return self.context.train_batch(batch, pending.group, made, longest, metrics, example, sampler=True)

    def _rewards(self, samples: Samples) -> np.ndarray:
        """[B, K] float64, as the annotator gave them; NaN where it gave none."""
        rewards = np.full(samples.lengths.shape, np.nan)
        for row, verdict in enumerate(samples.verdicts):
            if verdict is not None and verdict.scores:
                rewards[row] = verdict.scores
        return rewards

    def _scaled(self, pending: Rewarding) -> tuple[np.ndarray, np.ndarray]:
        """Rewards as the objective takes them [N, K], and the mask of their tokens [N, K, R], with the rows
        that only fill the batch."""
        settings, samples = self.settings, self.samples(pending)
        rewards = self._rewards(samples)
        last = np.take_along_axis(samples.tokens, np.maximum(samples.lengths - 1, 0)[..., None], axis=2)
        shaped = advantages.scaled(rewards, *self.scale)
        shaped = advantages.without_end(shaped, self.context.eos_mask[last[..., 0]], settings.missing_end)
        size = self.context.config.batch_size
        whole, lengths = np.full((size, self.count), np.nan), np.zeros((size, self.count), int)
        whole[: len(rewards)] = shaped
        lengths[: len(rewards)] = np.where(np.isfinite(rewards).any(1, keepdims=True), samples.lengths, 0)
        return whole, np.arange(settings.sampling.max_tokens) < lengths[..., None]

    def _placed(self, batch: TrainBatch, credits: dict[str, np.ndarray]) -> TrainBatch:
        """The batch with these fields of its responses on the devices."""

        def split(x: np.ndarray) -> jax.Array:
            return self.context.to_devices(x.reshape(-1, self.context.rows, *x.shape[1:]))

        placed: dict[str, Any] = {name: split(x) for name, x in credits.items()}
        return replace(
            batch,
            group=with_responses(batch.group, **placed | {"reference": (placed["reference"],)}),
        )

    def saved(self, round: Sequence[Rolling]) -> MakerState | None:
        """Of a round with updates left: its samples, and what was made of them."""
        if not round:
            return None
        each_batch, arrays = [], {}
        for number, pending in enumerate(round):
            assert isinstance(pending, Rewarding) and pending.credits is not None
            of_it = super().saved([pending])
            assert of_it is not None
            each_batch.append(of_it.metadata | {"told": pending.told})
            for name, x in (of_it.arrays | pending.credits).items():
                arrays[f"{name}_{number}"] = x
        return MakerState({"round": each_batch}, arrays)

    def restored(
        self, state: MakerState, batches: Sequence[tuple[HostBatch, PromptGroup]]
    ) -> list[Rolling]:
        round: list[Rolling] = []
        for number, (saved, given) in enumerate(zip(state.metadata["round"], batches, strict=True)):
            own = f"_{number}"
            arrays = {k.removesuffix(own): x for k, x in state.arrays.items() if k.endswith(own)}
            samples = {name: arrays.pop(name) for name in ARRAYS}
            (rolled,) = super().restored(MakerState(saved, samples), [given])
            pending = Rewarding(*given, rolled.made_at, rolled.local, rolled.samples, credits=arrays)
            pending.made, pending.told = self._placed(self._filled(pending), arrays), saved["told"]
            round.append(pending)
        return round

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


def _scale(place: Path) -> list[float]:
    """Mean and deviation, as a run's start wrote them."""
    remedy = "bring the run's own back, or give --out a new folder"
    found = read_json(place, remedy)
    values = [found.get(name) for name in ("mean", "deviation")]
    if not all(isinstance(x, float) and np.isfinite(x) for x in values) or values[1] <= 0:
        raise refusal(str(place), "it has no mean and deviation", remedy)
    return values


def _write(place: Path, text: str) -> None:
    with new_file(place) as file:
        file.write(text)


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    """[N, K, R] cut or lengthened to R = length; what is cut is padding."""
    x = x[:, :, :length]
    return np.pad(x, ((0, 0), (0, 0), (0, length - x.shape[-1])))


def _correlation(given: np.ndarray, lengths: np.ndarray) -> HostMetrics:
    """Pearson's, of rewards with lengths in tokens; none where either does not vary."""
    if given.size < 2 or not given.std() or not lengths.std():
        return {}
    return {"reward/length_correlation": (float(np.corrcoef(given, lengths)[0, 1]), 1.0)}
