"""Preference losses against TRL's trainers, run now: losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import needs, run
from signals import signals

from mllm_align import APO, BCO, CPO, DPO, EXO, KTO, ORPO, SimPO, Sum

B, R = 6, 7
FROZEN = {"mean": jnp.zeros(()), "count": jnp.zeros(())}  # TRL's bco_pair has no delta
OURS = {
    "dpo": DPO(0.3),
    "dpo_length": DPO(5.0, length_normalised=True),
    "exo": EXO(0.3),
    "bco": BCO(0.3),
    "mpo": Sum(),
    "apo_zero": APO(0.3),
    "apo_down": APO(0.3, "down"),
    "simpo": SimPO(2.0, 0.5),
    "cpo": CPO(0.3, 0.7),
    "orpo": ORPO(0.3),
    "kto": KTO(0.3, 1.5, 0.5),
}

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(12)
    mask = np.arange(R) < rng.integers(1, R + 1, (B, 4))[:, :, None]
    mask[0, 0] = True
    policy, change = (
        np.where(mask, rng.uniform(*ends, mask.shape), 0) for ends in ((-4, -0.1), (-0.5, 0.9))
    )
    return {"mask": mask, "policy": policy, "reference": policy - change}


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory):
    needs("torch", "trl")
    folder = tmp_path_factory.mktemp("trl")
    np.savez(folder / "in.npz", **given)
    run("preferences.py", folder / "in.npz", folder / "out.npz")
    return dict(np.load(folder / "out.npz"))


@pytest.mark.parametrize("name, objective", OURS.items())
def test_losses_and_gradients(given, theirs, name, objective):
    mask, policy, reference = (x[:, : objective.responses] for x in given.values())
    z = max(0, (given["policy"] - given["reference"])[:, 2:].sum(-1).mean())  # TRL: of the batch itself
    assert z > 0.1
    state = {"bco": FROZEN, "kto": {"z": jnp.float32(z)}, "mpo": {"bco": FROZEN}}.get(name, ())

    def loss(policy):
        seen = signals(policy, reference, mask, np.ones(B))
        sums, weights = objective(seen, state).sums, objective.weights(seen.responses)
        return sum(sums[term] / weights[term] for term in sums)

    found, gradient = jax.value_and_grad(loss)(jnp.asarray(policy, jnp.float32))
    assert float(found) == pytest.approx(float(theirs[f"{name}/loss"]), rel=1e-5)
    expected = theirs[f"{name}/gradient"]
    own, expected = (np.where(mask[:, :2], x[:, :2], 0) for x in (gradient, expected))
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3
