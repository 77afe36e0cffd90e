"""The train step: the only place that differentiates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from mllm_align.align.contract import Metrics, Objective, Signals
from mllm_align.batch import PromptGroup, Responses
from mllm_align.models.policy import SCORE, VALUE, image_features, policy_variables, tower_is_trained
from mllm_align.models.vlm import VisionLanguageModel, cast, variables
from mllm_align.sharding import traced_within

Tree = dict[str, Any]
Weights = dict[str, Any]
"""Term of the objective -> its weight []."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint saves: step [], trained parameters (float32), the optimizer's state and the
    objective's."""

    step: jax.Array
    trained: Tree
    optimizer: Any
    objective: Any = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Health:
    """Whether a step could be taken: gradient, loss, the other figures and what the objective's state takes
    are finite (in evaluation: the figures). rows: whose log-probs are not."""

    finite: Bool[Array, ""]
    rows: Bool[Array, "micro B"]


class Computed(NamedTuple):
    """Of one micro-batch. bad [B]: rows with a log-prob, score or value that is not a finite number."""

    metrics: Metrics
    stats: Any
    bad: Bool[Array, " B"]


def make_loss(
    model: VisionLanguageModel,
    objective: Objective,
    lora_scale: float,
    dtype: Any,
    sources: Sequence[str] = (),
) -> Callable:
    """loss(trained, base, group, weights, state) -> (sum, Computed) of one micro-batch.

    weights: W_i of every term over the whole batch. The batch's loss is the sum over its micro-batches,
    divided by the first term's weight: other terms are scaled to it. sources: names of the data sets that
    `group.source` numbers.
    """

    def loss(trained: Tree, base: Tree, group: PromptGroup, weights: Weights, state: Any):
        if group.views != objective.views:
            raise ValueError(f"the batch has views {group.views}, {objective} takes {objective.views}")
        policy, responses = policy_variables(base, trained, lora_scale, dtype), group.responses

        def features(variables: Tree) -> Any:
            return tuple(image_features(model, variables, each, dtype) for each in group.prefixes)

        own = shared = features(policy)
        reference: Any = responses.reference
        frozen: Any = None
        fixed: Any = None
        if "reference" in objective.needs and reference is None:
            frozen = variables(cast(base, dtype))
            # A frozen tower has the same output for policy and reference: it runs once.
            if tower_is_trained(trained):
                shared = features(frozen)
            made = model.apply(frozen, shared, group, method="logps_and_hidden")
            reference, fixed = jax.lax.stop_gradient(made)
        logps: Any = ()
        scores: Any = None
        kl: Any = None
        if "score" in objective.needs:
            head = group.prefix, responses, trained[SCORE]["kernel"]
            scores = model.apply(policy, *own, *head, method="scores")
        else:
            logps, hidden = model.apply(policy, own, group, method="logps_and_hidden")
            if "kl" in objective.needs:
                first = responses.take(group.views[0])
                kernel = model.apply(frozen, method="unembedding")
                kl = model.apply(policy, hidden, first, fixed, kernel, method="divergence")
        values: Any = None
        if "values" in objective.needs:
            critic = trained[VALUE]
            apart = policy_variables(base, critic, lora_scale, dtype)
            trains = tower_is_trained(trained) or tower_is_trained(critic)
            (seen,) = features(apart) if trains else own
            head = group.prefix, responses, critic[SCORE]["kernel"]
            values = model.apply(apart, seen, *head, method="values")
        signals = Signals(logps, reference, responses, group.views, scores, values, kl)
        sums, metrics, stats = objective(signals, state)
        unit, *others = sums
        total = sums[unit]
        for name in others:
            total = total + sums[name] * (_divisor(weights[unit]) / _divisor(weights[name]))
        part = objective.weights(responses)
        terms = {f"loss/{name}": (sums[name], part[name]) for name in sums} if others else {}
        metrics = {"loss": (total, part[unit]), **terms, **metrics}
        if group.source is not None:
            metrics |= by_source(objective, signals, state, group.source, sources)
        if responses.sampler is not None:
            metrics["rollout/logp_gap"] = sampler_gap(logps[0], responses)
        both = logps if reference is None else jax.tree.map(jnp.add, logps, reference)
        finite = [jnp.isfinite(view).all((1, 2)) for view in both] or [jnp.isfinite(scores).all(1)]
        finite += [] if values is None else [jnp.isfinite(values).all((1, 2))]
        if responses.references is not None:
            finite.append(jnp.isfinite(responses.references).all((1, 2, 3)))
        bad = ~jnp.stack(finite).all(0)
        return total, Computed(metrics, stats, bad)

    return loss


def by_source(
    objective: Objective, signals: Signals, state: Any, source: Any, names: Sequence[str]
) -> Metrics:
    """`source/NAME/loss`, of an objective of one term, and `source/NAME/margin`: the objective's figures if
    only that set's groups had weight. They weigh 0 where they are not finite, so that they stop no step."""
    found: Metrics = {}
    signals = jax.lax.stop_gradient(signals)
    for number, name in enumerate(names):
        own = replace(signals.responses, weight=jnp.where(source == number, signals.weight, 0.0))
        sums, metrics, _ = objective(replace(signals, responses=own), state)
        if len(sums) == 1:
            (unit,) = sums
            found[f"source/{name}/loss"] = sums[unit], objective.weights(own)[unit]
        if "rewards/margin" in metrics:
            found[f"source/{name}/margin"] = metrics["rewards/margin"]
    return {name: _finite_or_nothing(*pair) for name, pair in found.items()}


def _finite_or_nothing(total: Any, weight: Any) -> tuple[Any, Any]:
    finite = jnp.isfinite(total) & jnp.isfinite(weight)
    return jnp.where(finite, total, 0.0), jnp.where(finite, weight, 0.0)


def is_loss(metric: str) -> bool:
    """Whether a metric is the loss, or one of its terms where there are several."""
    return metric == "loss" or metric.startswith("loss/")


def _divisor(weight: Any) -> Any:
    """The weight, or 1 where nothing weighs: the sum is 0 there, and stays so."""
    return jnp.where(weight > 0, weight, 1)


def batch_weights(objective: Objective, batch: PromptGroup) -> Weights:
    """W_i of every term over all micro-batches."""
    return jax.tree.map(lambda x: x.sum(0), jax.vmap(objective.weights)(batch.responses))


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
    sources: Sequence[str] = (),
) -> Callable[[TrainState, Tree, PromptGroup], tuple[TrainState, Metrics, Health]]:
    """step(state, base, batch) -> (state, metrics, health), pure.

    batch: a PromptGroup whose leaves carry a leading axis of micro-batches. The gradient is that of the
    whole batch: sums are added over micro-batches and divided once by the weights of the batch. Where the
    loss or the gradient is not finite, or nothing weighs, parameters, optimizer and objective stay as they
    were; in the first case the metrics weigh 0. sources: see `make_loss`.
    """
    gradient = jax.grad(make_loss(model, objective, lora_scale, dtype, sources), has_aux=True)

    def step(state: TrainState, base: Tree, batch: PromptGroup) -> tuple[TrainState, Metrics, Health]:
        weights = batch_weights(objective, batch)

        def micro(group: PromptGroup):
            grads, made = gradient(state.trained, base, group, weights, state.objective)
            return (grads, made.metrics, made.stats), made.bad

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
        grads, metrics, stats = total
        # without any weight no group has a usable pair; the gradient is 0 and stays so
        _, unit = metrics["loss"]
        some = reduce(jnp.logical_or, (w > 0 for name, (_, w) in metrics.items() if is_loss(name)))
        grads = jax.tree.map(lambda g: g / _divisor(unit), grads)
        norm = optax.tree.norm(grads)
        finite = _all_finite((norm, metrics, stats))
        updates, opt_state = optimizer.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        updated = trained, opt_state, objective.update(state.objective, stats)
        before = state.trained, state.optimizer, state.objective
        updated = jax.tree.map(lambda new, old: jnp.where(finite & some, new, old), updated, before)
        one = jnp.ones((), jnp.float32)
        metrics = {**metrics, "grad_norm": (norm, one)}
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
        metrics["skipped"] = (1 - (finite & some).astype(jnp.float32), one)
        return TrainState(state.step + 1, *updated), metrics, Health(finite, rows)  # type: ignore[arg-type]

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
) -> Callable[..., tuple[Metrics, Health]]:
    """evaluate(trained, base, batch, state) -> (metrics as (sum, weight), health), of a batch with
    micro-batches. state: the objective's.

    Where a figure is not finite, the metrics weigh 0.
    """
    loss = make_loss(model, objective, lora_scale, dtype)

    def evaluate(trained: Tree, base: Tree, batch: PromptGroup, state: Any) -> tuple[Metrics, Health]:
        weights = batch_weights(objective, batch)

        def micro(group: PromptGroup) -> Any:
            made = loss(trained, base, group, weights, state)[1]
            return made.metrics, made.bad

        each, rows = jax.lax.map(micro, batch)
        metrics = jax.tree.map(lambda x: x.sum(0), each)
        finite = _all_finite(metrics)
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
        return metrics, Health(finite, rows)  # type: ignore[arg-type]

    return traced_within(mesh, evaluate, dtype)
