"""RLOO and GRPO against TRL's trainers, run now: advantages, losses and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import needs, run

from mllm_align.align.contract import Signals
from mllm_align.align.policy_gradient import GRPO, RLOO
from mllm_align.batch import Responses

B, K, R = 6, 4, 7
BETA, CLIP, LENGTH = 0.3, 0.2, 11
PUBLISHED = GRPO(responses=K, beta=BETA, clip=CLIP, length=LENGTH)
OURS = {
    "rloo": RLOO(responses=K, beta=BETA, clip=CLIP),
    "grpo": PUBLISHED,
    "dapo": replace(PUBLISHED, normalisation="token"),
    "dr_grpo": replace(PUBLISHED, normalisation="constant", by_deviation=False),
    "corrected": replace(PUBLISHED, corrected_kl=True),
}

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(11)
    lengths = rng.integers(1, R + 1, (B, K))
    lengths[0, 0] = R
    mask = np.arange(R) < lengths[:, :, None]

    def tokens(low, high):
        return np.where(mask, rng.uniform(low, high, mask.shape), 0)

    old = tokens(-4, -0.6)
    rewards = rng.normal(size=(B, K))
    rewards[1, 2] = rewards[2, :3] = rewards[3] = np.nan  # one, all but one, and none could be scored
    return {
        "mask": mask,
        "rewards": rewards,
        "old": old,
        "policy": old + tokens(-0.5, 0.5),
        "reference": old + tokens(-1, 0.5),
    }


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    needs("torch", "trl")
    folder = tmp_path_factory.mktemp("trl")
    rows = {name: x.reshape(B * K, *x.shape[2:]) for name, x in given.items()}
    np.savez(folder / "in.npz", K=K, beta=BETA, clip=CLIP, length=LENGTH, **rows)
    run("policy_gradients.py", folder / "in.npz", folder / "out.npz")
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("name, objective", OURS.items())
def test_advantages_losses_and_gradients(given, theirs, name, objective):
    arrays = [given[each] for each in ("rewards", "mask", "old", "reference")]
    (advantages,) = objective.credit(*arrays).values()
    expected = theirs[f"{name}/advantages"].reshape(B, K)
    np.testing.assert_allclose(advantages[:, :, 0], expected, rtol=1e-5, atol=1e-12)
    assert np.abs(expected).max() > 0.5 and (expected == 0).sum() == 9

    mask, reference = jnp.asarray(given["mask"]), jnp.asarray(given["reference"], jnp.float32)
    fields = {
        key: jnp.asarray(x, jnp.float32) for key, x in (("old", given["old"]), ("advantages", advantages))
    }
    responses = Responses(jnp.zeros(mask.shape, jnp.int32), mask, jnp.ones(B), **fields)

    def loss(policy):
        terms = objective(Signals((policy,), (reference,), responses, objective.views))
        return terms.sums["policy"] / objective.weights(responses)["policy"], terms.metrics

    policy = jnp.asarray(given["policy"], jnp.float32)
    (found, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(policy)
    clipped, weight = metrics["policy/clipped"]
    assert 0 < float(clipped / weight) == pytest.approx(float(theirs[f"{name}/clipped"]), rel=1e-5)
    assert float(found) == pytest.approx(float(theirs[f"{name}/loss"]), rel=1e-5)
    expected = theirs[f"{name}/gradient"].reshape(gradient.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
