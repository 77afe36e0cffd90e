"""The value model beside the policy: what it says of a state, and how the step trains it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import goldens, union

from mllm_align.align.contract import Signals
from mllm_align.align.policy_gradient import PPO
from mllm_align.batch import Group, pad, stack, with_responses
from mllm_align.models.lora import init_lora
from mllm_align.models.policy import policy_variables
from mllm_align.models.vlm import variables
from mllm_align.training.step import TrainState, make_step

GOLDEN = goldens("llava15")
SCALE = 2.0
OBJECTIVE = PPO(responses=2, value_weight=0.5)
KERNEL = np.random.default_rng(1).normal(0, 0.1, GOLDEN.config.decoder.hidden).astype(np.float32)


@pytest.fixture(scope="module")
def batch():
    """Two groups, and a rollout's figures for every token."""
    groups = [Group(g.prefixes, g.responses) for g in GOLDEN.groups()[:2]]
    made = pad(groups, union(groups), 2)
    mask, rng = np.asarray(made.responses.mask), np.random.default_rng(2)
    names = ("old", "advantages", "values", "returns")
    given = {name: np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32) for name in names}
    reference = np.where(mask, -3 * rng.random(mask.shape), 0).astype(np.float32)
    given["old"] = np.where(mask, -3 * rng.random(mask.shape), 0).astype(np.float32)
    return with_responses(made, reference=(reference,), **given)


def test_a_value_is_the_score_of_what_was_said_before(batch):
    responses, places = batch.responses, np.arange(batch.responses.mask.shape[-1])

    @jax.jit
    def both(mask):
        policy = variables(GOLDEN.base)
        (features,) = (GOLDEN.model.apply(policy, p.pixels, method="features") for p in batch.prefixes)
        of = with_responses(batch, mask=mask).responses
        given = features, batch.prefix, of, jnp.asarray(KERNEL)
        return tuple(GOLDEN.model.apply(policy, *given, method=name) for name in ("values", "scores"))

    values = np.asarray(both(responses.mask)[0])
    assert values.dtype == np.float32 and not values[~responses.mask].any()
    assert np.ptp(values[responses.mask]) > 0.1
    np.testing.assert_array_equal(values[:, 0, 0], values[:, 1, 0])  # nothing was said yet
    for said in places[1:]:
        _, scores = both(responses.mask & (places < said))
        there = responses.mask[:, :, said]
        np.testing.assert_allclose(values[:, :, said][there], np.asarray(scores)[there], atol=1e-4)


@pytest.mark.slow
def test_the_step_trains_policy_and_value_model_each_by_its_own_term(batch):
    def tree(seed):
        lora = init_lora(GOLDEN.config.decoder, 2, ("q", "v"), jax.random.key(seed))
        lora = jax.tree.map(lambda x: x + 0.01, lora)  # b too is not 0
        return {"lora": lora, "params": {"projector": GOLDEN.base["projector"]}}

    trained = {**tree(0), "value": {**tree(1), "score": {"kernel": jnp.asarray(KERNEL)}}}

    @jax.jit
    @jax.value_and_grad
    def plain(trained):
        """The same from two whole models."""
        policy, critic = (
            policy_variables(GOLDEN.base, t, SCALE, jnp.float32) for t in (trained, trained["value"])
        )
        (features,) = (GOLDEN.model.apply(critic, p.pixels, method="features") for p in batch.prefixes)
        head = batch.prefix, batch.responses, trained["value"]["score"]["kernel"]
        values = GOLDEN.model.apply(critic, features, *head, method="values")
        logps = GOLDEN.model.apply(policy, batch)
        reference = batch.responses.reference
        signals = Signals(logps, reference, batch.responses, batch.views, values=values)
        sums, weights = OBJECTIVE(signals).sums, OBJECTIVE.weights(batch.responses)
        return sum(sums[name] / weights[name] for name in sums)

    descent = optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, _, params=None: (grads, grads),
    )
    step = jax.jit(make_step(GOLDEN.model, OBJECTIVE, descent, SCALE, jnp.float32))
    state = TrainState(jnp.zeros((), jnp.int32), trained, descent.init(trained))
    state, metrics, health = step(state, GOLDEN.base, stack([batch]))
    assert health.finite and not health.rows.any()
    loss, gradient = plain(trained)
    found = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["loss/policy"] + found["loss/value"] == pytest.approx(float(loss), rel=1e-5)
    assert all(np.abs(x).max() > 1e-5 for x in jax.tree.leaves(gradient))
    for ours, theirs in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
