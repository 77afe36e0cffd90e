"""The train step: the only place that differentiates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from mllm_align.align.objectives import LogProbs, Metrics, Objective
from mllm_align.batch import PromptGroup, Responses
from mllm_align.models.policy import policy_variables, tower_is_trained
from mllm_align.models.vlm import VisionLanguageModel, cast, variables
from mllm_align.sharding import traced_within

Tree = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint saves: step [], trained parameters (float32) and the optimizer's state."""

    step: jax.Array
    trained: Tree
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Health:
    """Whether a step could be taken: gradient, loss and the other figures are finite (in evaluation: the
    figures). rows: whose log-probs are not."""

    finite: Bool[Array, ""]
    rows: Bool[Array, "micro B"]


def make_loss(model: VisionLanguageModel, objective: Objective, lora_scale: float, dtype: Any) -> Callable:
    """loss(trained, base, group) -> (sum, (weight, metrics, bad)) of one micro-batch.

    bad [B]: rows with a log-prob that is not a finite number.
    """

    def loss(trained: Tree, base: Tree, group: PromptGroup):
        policy, responses = policy_variables(base, trained, lora_scale, dtype), group.responses

        def features(variables: Tree) -> Any:
            pixels = (prefix.pixels.astype(dtype) for prefix in group.prefixes)
            return tuple(model.apply(variables, each, method="features") for each in pixels)

        seen = shared = features(policy)
        reference: Any = responses.reference
        if objective.needs_reference and reference is None:
            frozen = variables(cast(base, dtype))
            # A frozen tower says the same for policy and reference: it runs once.
            if tower_is_trained(trained):
                shared = features(frozen)
            reference = jax.lax.stop_gradient(model.apply(frozen, shared, group, method="logps"))
        views: Any = model.apply(policy, seen, group, method="logps")
        (logps,), (reference,) = views, (None,) if reference is None else reference
        total, weight, metrics = objective(LogProbs(logps, reference, responses.mask, responses.weight))
        bad = ~jnp.isfinite(logps if reference is None else logps + reference).all((1, 2))
        metrics = {"loss": (total, weight), **metrics}
        if responses.sampler is not None:
            metrics["rollout/logp_gap"] = sampler_gap(logps, responses)
        return total, (weight, metrics, bad)

    return loss


def sampler_gap(logps: Any, responses: Responses) -> Any:
    """(sum, tokens) of how far the log-probs that the sampler saw lie from those of this forward pass."""
    sampler: Any = responses.sampler
    sampled = responses.mask & (sampler < 0) & (responses.weight > 0)[:, None, None]
    gap = jnp.where(sampled, jnp.abs(jax.lax.stop_gradient(logps) - sampler), 0.0)
    return gap.sum(), sampled.sum().astype(jnp.float32)


def make_step(
    model: VisionLanguageModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    lora_scale: float,
    dtype: Any,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Tree, PromptGroup], tuple[TrainState, Metrics, Health]]:
    """step(state, base, batch) -> (state, metrics, health), pure.

    batch: a PromptGroup whose leaves carry a leading axis of micro-batches. The gradient is that of the
    whole batch: sums are added over micro-batches and divided once by the added weights. Where the loss
    or the gradient is not finite, or nothing weighs, parameters and optimizer stay as they were; in the
    first case the metrics weigh 0.
    """
    gradient = jax.grad(make_loss(model, objective, lora_scale, dtype), has_aux=True)

    def step(state: TrainState, base: Tree, batch: PromptGroup) -> tuple[TrainState, Metrics, Health]:
        def micro(group: PromptGroup):
            grads, (weight, metrics, bad) = gradient(state.trained, base, group)
            return (grads, weight, metrics), bad

        def add(total, group):
            more, bad = micro(group)
            return jax.tree.map(jnp.add, total, more), bad

        first = jax.tree.map(lambda x: x[0], batch)
        if len(batch.responses.weight) == 1:
            total, bad = micro(first)
            rows = bad[None]
        else:
            shapes, _ = jax.eval_shape(micro, first)
            total, rows = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), batch)
        grads, weight, metrics = total
        some = weight > 0  # else no group has a usable pair; the gradient is 0 and stays so
        grads = jax.tree.map(lambda g: g / jnp.where(some, weight, 1), grads)
        norm = optax.global_norm(grads)
        finite = _all_finite((norm, metrics))
        updates, opt_state = optimizer.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite & some, new, old),
            (trained, opt_state),
            (state.trained, state.optimizer),
        )
        one = jnp.ones((), jnp.float32)
        metrics = {**metrics, "grad_norm": (norm, one)}
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
        metrics["skipped"] = (1 - (finite & some).astype(jnp.float32), one)
        return TrainState(state.step + 1, trained, opt_state), metrics, Health(finite, rows)  # type: ignore[arg-type]

    return traced_within(mesh, step, dtype)


def _all_finite(figures: Any) -> Bool[Array, ""]:
    if jax.config.values["jax_debug_nans"]:  # JAX looks for NaN in what a program returns
        return jnp.ones((), bool)
    return jnp.stack([jnp.isfinite(x) for x in jax.tree.leaves(figures)]).all()


def make_evaluation(
    model: VisionLanguageModel,
    objective: Objective,
    lora_scale: float,
    dtype: Any,
    mesh: Mesh | None = None,
) -> Callable[[Tree, Tree, PromptGroup], tuple[Metrics, Health]]:
    """evaluate(trained, base, batch) -> (metrics as (sum, weight), health), of a batch with micro-batches.

    Where a figure is not finite, the metrics weigh 0.
    """
    loss = make_loss(model, objective, lora_scale, dtype)

    def evaluate(trained: Tree, base: Tree, batch: PromptGroup) -> tuple[Metrics, Health]:
        each, rows = jax.lax.map(lambda group: loss(trained, base, group)[1][1:], batch)
        metrics = jax.tree.map(lambda x: x.sum(0), each)
        finite = _all_finite(metrics)
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
        return metrics, Health(finite, rows)  # type: ignore[arg-type]

    return traced_within(mesh, evaluate, dtype)
