"""The train step: the only place that differentiates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mllm_align.align.objectives import LogProbs, Metrics, Objective
from mllm_align.batch import PromptGroup
from mllm_align.models.llava import Llava, cast, variables
from mllm_align.models.policy import policy_variables, tower_is_trained

Tree = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint saves: step [], trained parameters (float32) and the optimizer's state."""

    step: jax.Array
    trained: Tree
    optimizer: Any


def make_loss(model: Llava, objective: Objective, lora_scale: float, dtype: Any) -> Callable:
    """loss(trained, base, group) -> (sum, (weight, metrics)) of one micro-batch."""

    def loss(trained: Tree, base: Tree, group: PromptGroup):
        policy = policy_variables(base, trained, lora_scale, dtype)
        tiles = group.tiles.astype(dtype)
        features = shared = model.apply(policy, tiles, method="features")
        reference = group.reference_logps
        if objective.needs_reference and reference is None:
            frozen = variables(cast(base, dtype))
            # A frozen tower says the same for policy and reference: it runs once.
            if tower_is_trained(trained):
                shared = model.apply(frozen, tiles, method="features")
            reference = model.apply(frozen, shared, group, method="response_logps")
            reference = jax.lax.stop_gradient(reference)
        logps = model.apply(policy, features, group, method="response_logps")
        seen = LogProbs(logps, reference, group.response_mask, group.weight)  # type: ignore[arg-type]
        total, weight, metrics = objective(seen)
        return total, (weight, {"loss": (total, weight), **metrics})

    return loss


def make_step(
    model: Llava,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    lora_scale: float,
    dtype: Any,
) -> Callable[[TrainState, Tree, PromptGroup], tuple[TrainState, Metrics]]:
    """step(state, base, batch) -> (state, metrics), pure.

    batch: a PromptGroup whose leaves carry a leading axis of micro-batches. The gradient is that of the
    whole batch: sums are added over micro-batches and divided once by the added weights.
    """
    gradient = jax.grad(make_loss(model, objective, lora_scale, dtype), has_aux=True)

    def step(state: TrainState, base: Tree, batch: PromptGroup) -> tuple[TrainState, Metrics]:
        def micro(group: PromptGroup):
            return gradient(state.trained, base, group)

        def add(total, group):
            return jax.tree.map(jnp.add, total, micro(group)), None

        first = jax.tree.map(lambda x: x[0], batch)
        if len(batch.weight) == 1:
            total = micro(first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, first))
            total, _ = jax.lax.scan(add, zeros, batch)
        grads, (weight, metrics) = total
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        one = jnp.ones((), jnp.float32)
        metrics = {**metrics, "grad_norm": (optax.global_norm(grads), one)}
        return TrainState(state.step + 1, trained, opt_state), metrics  # type: ignore[arg-type]

    return step


def make_evaluation(
    model: Llava, objective: Objective, lora_scale: float, dtype: Any
) -> Callable[[Tree, Tree, PromptGroup], Metrics]:
    """evaluate(trained, base, batch) -> metrics as (sum, weight), of a batch with micro-batches."""
    loss = make_loss(model, objective, lora_scale, dtype)

    def evaluate(trained: Tree, base: Tree, batch: PromptGroup) -> Metrics:
        each = jax.lax.map(lambda group: loss(trained, base, group)[1][1], batch)
        return jax.tree.map(lambda x: x.sum(0), each)

    return evaluate
