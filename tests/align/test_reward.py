"""The reward model's loss, against float64 arithmetic written out from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.align.contract import Signals
from mllm_align.align.reward import Reward
from mllm_align.batch import Responses
from mllm_align.errors import InputError

SCORES = np.array([[1.5, -0.25], [0.5, 0.75], [9.0, 9.0], [-2.0, 1.0]])
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])


def terms(objective, scores=SCORES, weight=WEIGHT):
    mask = jnp.ones((len(weight), 2, 3), bool)
    responses = Responses(jnp.zeros(mask.shape, jnp.int32), mask, jnp.asarray(weight, jnp.float32))
    signals = Signals((), None, responses, ((0, 1),), jnp.asarray(scores, jnp.float32))
    return objective(signals), objective.weights(responses)


@pytest.mark.parametrize("margin, centring", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.01), (1.25, 0.1)])
def test_the_loss_by_hand(margin, centring):
    chosen, rejected = SCORES.T
    each = np.log1p(np.exp(-(chosen - rejected - margin))) + centring * (chosen + rejected) ** 2
    made, weights = terms(Reward(margin, centring))
    assert float(made.sums["pairs"]) == pytest.approx((each * WEIGHT).sum(), rel=1e-6)
    assert float(weights["pairs"]) == 3


def test_the_figures():
    made, _ = terms(Reward(margin=3.0, centring=0.1))
    values = {name: float(total / weight) for name, (total, weight) in made.metrics.items()}
    assert values == pytest.approx(
        {
            "rewards/chosen": 0.0,
            "rewards/rejected": 0.5,
            "rewards/margin": (1.75 - 0.25 - 3) / 3,
            "rewards/accuracy": 1 / 3,
        },
        abs=1e-6,
    )


def test_the_gradient_is_that_of_finite_differences():
    objective, step = Reward(0.5, 0.05), 1e-2

    def loss(scores):
        return terms(objective, scores)[0].sums["pairs"]

    found = np.asarray(jax.grad(loss)(jnp.asarray(SCORES, jnp.float32)))
    for place in np.ndindex(SCORES.shape):
        moved = np.zeros_like(SCORES)
        moved[place] = step
        expected = (float(loss(SCORES + moved)) - float(loss(SCORES - moved))) / (2 * step)
        assert found[place] == pytest.approx(expected, abs=2e-3)
    assert (found[2] == 0).all(), "a group that only fills the batch"


@pytest.mark.parametrize("settings", [{"margin": -1.0}, {"centring": float("nan")}, {"margin": "much"}])
def test_settings_are_checked(settings):
    with pytest.raises(InputError, match=f"objective.{next(iter(settings))} is"):
        Reward(**settings)
