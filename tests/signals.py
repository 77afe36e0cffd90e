"""What objectives take and give, from plain arrays."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mllm_align.align.contract import Objective, Signals
from mllm_align.batch import Responses


def signals(policy: Any, reference: Any, mask: Any, weight: Any) -> Signals:
    """Of one view; reference may be None."""
    policy = jnp.asarray(policy, jnp.float32)
    if reference is not None:
        reference = (jnp.asarray(reference, jnp.float32),)
    mask, weight = jnp.asarray(mask), jnp.asarray(weight, jnp.float32)
    responses = Responses(jnp.zeros(mask.shape, jnp.int32), mask, weight)
    return Signals((policy,), reference, responses, (tuple(range(mask.shape[1])),))


def computed(objective: Objective, given: Signals) -> tuple[Any, Any, Any]:
    """(sum, weight, metrics) of an objective of one term."""
    terms = objective(given, objective.init_state())
    ((name, total),) = terms.sums.items()
    return total, objective.weights(given.responses)[name], terms.metrics
