"""Objectives against float64 arithmetic written out from their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from signals import computed, signals

from mllm_align.align.checks import check_terms
from mllm_align.align.pairwise import DPO, IPO, Averaged, RobustDPO, SLiC
from mllm_align.align.sft import SFT
from mllm_align.errors import InputError

LENGTHS = np.array([[3, 5], [6, 1], [2, 2], [4, 6]])
MASK = np.arange(6) < LENGTHS[:, :, None]
RNG = np.random.default_rng(3)
POLICY, REFERENCE = (np.where(MASK, -5 * RNG.random(MASK.shape), 0) for _ in range(2))
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])


def softplus(x):
    """-log sigmoid(-x)"""
    return np.log1p(np.exp(x))


# The loss of a pair by h, the difference of log-ratios, and by g, that of log-ratios per token.
BY_HAND = [
    (DPO(), lambda h, g: softplus(-0.1 * h)),
    (DPO(beta=0.5), lambda h, g: softplus(-0.5 * h)),
    (DPO(0.5, 0.2), lambda h, g: 0.8 * softplus(-0.5 * h) + 0.2 * softplus(0.5 * h)),
    (RobustDPO(0.5, 0.2), lambda h, g: (0.8 * softplus(-0.5 * h) - 0.2 * softplus(0.5 * h)) / 0.6),
    (IPO(beta=0.25), lambda h, g: (g - 2) ** 2),
    (IPO(beta=0.25, length_normalised=False), lambda h, g: (h - 2) ** 2),
    (SLiC(beta=0.5), lambda h, g: np.maximum(0, 1 - 0.5 * h)),
]
IDS = [str(objective) for objective, _ in BY_HAND]
PAIRWISE = [objective for objective, _ in BY_HAND]
EVERY = [*PAIRWISE, SFT()]


def logps(policy=POLICY, reference=REFERENCE, mask=MASK, weight=WEIGHT):
    return signals(policy, reference, mask, weight)


def part(which):
    return logps(POLICY[which], REFERENCE[which], MASK[which], WEIGHT[which])


def assert_same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def by_hand(formula, policy):
    """The summed loss."""
    ratios = (policy - REFERENCE).sum(-1)
    h, g = (x[:, 0] - x[:, 1] for x in (ratios, ratios / LENGTHS))
    return (formula(h, g) * WEIGHT).sum()


@pytest.mark.parametrize("objective, formula", BY_HAND, ids=IDS)
def test_pairwise_losses(objective, formula):
    total, weight, metrics = computed(objective, logps())
    assert float(weight) == 3
    assert float(total) == pytest.approx(by_hand(formula, POLICY), rel=1e-5)
    reward = objective.beta * (POLICY - REFERENCE).sum(-1)
    margin = reward[:, 0] - reward[:, 1]
    expected = {
        "rewards/chosen": reward[:, 0],
        "rewards/rejected": reward[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": margin > 0,
        "logps/chosen": POLICY[:, 0].sum(-1),
        "logps/rejected": POLICY[:, 1].sum(-1),
    }
    assert metrics.keys() == expected.keys()
    assert 0 < (expected["rewards/accuracy"] * WEIGHT).sum() < 3
    for name, (value, count) in metrics.items():
        assert float(count) == 3
        assert float(value) == pytest.approx((expected[name] * WEIGHT).sum(), rel=1e-5), name


def test_sft_is_the_mean_over_tokens_of_the_chosen_responses():
    total, weight, metrics = computed(SFT(), logps())
    chosen = POLICY[:, 0].sum(-1)
    assert float(weight) == 3 + 6 + 4
    assert float(total) == pytest.approx(-(chosen * WEIGHT).sum(), rel=1e-5)
    assert float(metrics["logps/chosen"][0]) == pytest.approx((chosen * WEIGHT).sum(), rel=1e-5)
    assert float(metrics["logps/chosen"][1]) == 3
    alone = logps(POLICY[:, :1], REFERENCE[:, :1], MASK[:, :1])
    assert_same(computed(SFT(), alone), (total, weight, metrics))


def test_sft_weight_adds_the_loss_of_chosen_tokens():
    given = logps()
    plain, both = (DPO(0.5, 0.2, weight)(given) for weight in (0.0, 2.0))
    chosen = (POLICY[:, 0].sum(-1) * WEIGHT).sum()
    assert both.sums.keys() == {"pairs", "nll"} and both.metrics.keys() == plain.metrics.keys()
    assert float(both.sums["pairs"]) == float(plain.sums["pairs"])
    assert float(both.sums["nll"]) == pytest.approx(-2 * chosen, rel=1e-5)
    weights = DPO(sft_weight=2.0).weights(given.responses)
    assert {name: float(value) for name, value in weights.items()} == {"pairs": 3, "nll": 3 + 6 + 4}
    gradient = jax.grad(lambda p: DPO(0.5, 0.2, 2.0)(logps(p)).sums["nll"])(
        jnp.asarray(POLICY, jnp.float32)
    )
    expected = np.where(MASK, -2 * WEIGHT[:, None, None] * np.array([1, 0])[:, None], 0)
    np.testing.assert_array_equal(np.where(MASK, gradient, 0), expected)
    check_terms(RobustDPO(sft_weight=2.0))
    check_terms(Averaged(pair=DPO(sft_weight=2.0)))


@pytest.mark.parametrize("objective, formula", BY_HAND, ids=IDS)
def test_gradients_by_finite_differences(objective, formula):
    gradient = jax.grad(lambda p: computed(objective, logps(p))[0])
    found = gradient(jnp.asarray(POLICY, jnp.float32))
    for place in np.argwhere(MASK):
        bump = np.zeros(MASK.shape)
        bump[tuple(place)] = 1e-6
        slope = by_hand(formula, POLICY + bump) - by_hand(formula, POLICY - bump)
        assert float(found[tuple(place)]) == pytest.approx(slope / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_padding_changes_nothing(objective):
    longer = [np.pad(x, ((0, 0), (0, 0), (0, 4))) for x in (POLICY, REFERENCE, MASK)]
    assert_same(computed(objective, logps(*longer)), computed(objective, logps()))


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_groups_of_weight_zero_do_not_count(objective):
    assert_same(computed(objective, part(np.array([0, 1, 3]))), computed(objective, logps()))


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_sums_of_micro_batches_add_up(objective):
    parts = [computed(objective, part(slice(*each))) for each in ((0, 1), (1, 4))]
    assert_same(jax.tree.map(jnp.add, *parts), computed(objective, logps()))


def test_no_label_smoothing_is_plain_dpo():
    assert_same(
        computed(RobustDPO(beta=0.3, label_smoothing=0.0), logps()), computed(DPO(beta=0.3), logps())
    )
    assert_same(computed(DPO(beta=0.3, label_smoothing=0.0), logps()), computed(DPO(beta=0.3), logps()))


@pytest.mark.parametrize("ratio", [-1e5, 1e5])
@pytest.mark.parametrize("objective", PAIRWISE, ids=str)
def test_extreme_ratios_stay_finite(objective, ratio):
    far = jnp.asarray(np.where(MASK, np.array([ratio, 0.0])[:, None], 0.0), jnp.float32)
    value, gradient = jax.value_and_grad(lambda p: computed(objective, logps(p))[0])(far)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: DPO(beta=-0.1), ["objective.beta", "-0.1", "at least 0"]),
        (lambda: DPO(beta=float("nan")), ["objective.beta", "nan"]),
        (lambda: DPO(label_smoothing=0.5), ["objective.label_smoothing", "0.5", "below 0.5"]),
        (lambda: DPO(label_smoothing=-0.1), ["objective.label_smoothing", "-0.1"]),
        (lambda: DPO(sft_weight=-1), ["objective.sft_weight", "-1", "at least 0"]),
        (lambda: RobustDPO(label_smoothing=0.6), ["objective.label_smoothing", "0.6"]),
        (lambda: RobustDPO(beta=-1), ["objective.beta"]),
        (lambda: RobustDPO(beta=float("inf")), ["objective.beta", "inf"]),
        (lambda: IPO(beta=0), ["objective.beta", "0"]),
        (lambda: SLiC(beta=-2), ["objective.beta", "-2"]),
    ],
)
def test_invalid_settings_are_refused(make, words):
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_who_needs_a_reference():
    assert all(objective.needs == {"reference"} for objective in PAIRWISE)
    assert all(objective.responses == 2 for objective in PAIRWISE)
    assert not SFT.needs and SFT.responses == 1
    without = logps(reference=None)
    assert np.isfinite(computed(SFT(), without)[0])
    for objective in PAIRWISE:
        with pytest.raises(ValueError, match=f"{type(objective).__name__}.*reference"):
            computed(objective, without)
