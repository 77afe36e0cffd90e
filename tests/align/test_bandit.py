"""Policy gradients on a bandit of one token whose optimum is known: whole loops in a second or two.

The policy is a table of logits. Where the divergence from the reference is that of policy from reference,
the optimum is pi proportional to pi_ref exp(reward / beta).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mllm_align.align.contract import Signals
from mllm_align.align.policy_gradient import GRPO, PPO, RLOO
from mllm_align.batch import Responses

REWARDS = np.array([1.0, 0.4, 0.0, -0.5, 0.8, 0.2])
START = np.array([0.1, 0.3, 0.2, 0.15, 0.05, 0.2])  # the reference, and where the policy begins
BETA = 0.5
PROMPTS, ROUNDS, UPDATES, RATE = 64, 150, 2, 0.05


# GRPO's baseline contains the response itself, so that of K responses rewards count by (K - 1) / K.
GRPO8 = GRPO(beta=BETA * 7 / 8, responses=8, by_deviation=False)


def optimum():
    policy = START * np.exp(REWARDS / BETA)
    return policy / policy.sum()


def reverse_optimum():
    """Of KL(reference || policy): beta pi_ref / (c - reward), c by bisection."""
    low, high = REWARDS.max(), REWARDS.max() + BETA
    for _ in range(100):
        c = (low + high) / 2
        too_much = (BETA * START / (c - REWARDS)).sum() > 1
        low, high = (c, high) if too_much else (low, c)
    return BETA * START / (c - REWARDS)


def distance(one, two):
    """Total variation."""
    return np.abs(one - two).sum() / 2


def learn(objective, seed=0):
    """The policy after so many rounds, each a rollout and some updates on it."""
    optimizer = optax.adam(optax.linear_schedule(RATE, 0.0, ROUNDS * UPDATES))
    table = {"logits": jnp.log(jnp.asarray(START, jnp.float32)), "value": jnp.zeros(())}
    reference = np.log(START)
    shape = PROMPTS, objective.responses, 1
    mask = jnp.ones(shape, bool)

    def loss(table, actions, fields):
        policy = jax.nn.log_softmax(table["logits"])[actions]
        responses = Responses(actions, mask, jnp.ones(PROMPTS), **fields)
        values = jnp.broadcast_to(table["value"], shape)
        known = jnp.asarray(reference, jnp.float32)[actions]
        signals = Signals((policy,), (known,), responses, objective.views, values=values)
        sums, weights = objective(signals).sums, objective.weights(responses)
        return sum(sums[name] / weights[name] for name in sums)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(table, state, actions, fields):
        gradient = jax.grad(loss)(table, actions, fields)
        with jax.numpy_dtype_promotion("standard"):  # as for users; optax mixes dtypes
            moves, state = optimizer.update(gradient, state)
        return optax.apply_updates(table, moves), state

    rng, state = np.random.default_rng(seed), optimizer.init(table)
    for _ in range(ROUNDS):
        logits, value = np.asarray(table["logits"], np.float64), float(table["value"])
        lp = logits - np.log(np.exp(logits).sum())
        actions = rng.choice(len(lp), shape, p=np.exp(lp))
        given = {"old": lp[actions]} | ({"values": np.full(shape, value)} if objective.fields[2:] else {})
        made = objective.credit(
            REWARDS[actions][..., 0], mask, lp[actions], reference[actions], given.get("values")
        )
        fields = {name: jnp.asarray(x, jnp.float32) for name, x in (given | made).items()}
        for _ in range(UPDATES):
            table, state = update(table, state, jnp.asarray(actions, jnp.int32), fields)
    return np.asarray(jax.nn.softmax(table["logits"]))


@pytest.mark.parametrize(
    "objective",
    [
        RLOO(beta=BETA),
        replace(GRPO8, corrected_kl=True),
        PPO(beta=BETA, responses=4, value_weight=1.0),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_policy_becomes_the_reference_times_the_exponential_of_the_reward(objective):
    assert distance(START, optimum()) > 0.25
    assert distance(learn(objective), optimum()) < 0.02


def test_published_grpo_has_another_optimum():
    """The gradient of k3 on fresh samples is that of KL(reference || policy)."""
    found = learn(GRPO8)
    assert distance(found, optimum()) > 0.1
    assert distance(found, reverse_optimum()) < 0.02
