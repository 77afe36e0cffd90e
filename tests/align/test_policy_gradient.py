"""RLOO, GRPO and PPO against float64 arithmetic written out, token by token, from their formulas."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.align.contract import Signals
from mllm_align.align.policy_gradient import GRPO, PPO, RLOO
from mllm_align.batch import Responses
from mllm_align.errors import InputError

LENGTHS = np.array([[3, 5, 1], [6, 1, 2], [2, 4, 4], [4, 6, 0]])
MASK = np.arange(6) < LENGTHS[:, :, None]
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])
RNG = np.random.default_rng(3)


def tokens(low, high):
    return np.where(MASK, RNG.uniform(low, high, MASK.shape), 0)


OLD = tokens(-4, -1)
POLICY = OLD + tokens(-0.5, 0.5)
REFERENCE = OLD + tokens(-1, 1)
V_OLD, RETURNS = tokens(-1, 1), tokens(-2, 2)
VALUES = V_OLD + tokens(-0.5, 0.5)
SEQUENCE = np.where(MASK, RNG.normal(size=LENGTHS.shape)[..., None], 0)
EACH = tokens(-2, 2)
GIVEN = {"old": OLD, "advantages": SEQUENCE, "values": V_OLD, "returns": RETURNS}
BETA, EPS = 0.3, 0.2

RLOO3 = RLOO(responses=3, beta=BETA)
GRPO3 = GRPO(responses=3, beta=BETA)
PPO3 = PPO(responses=3, beta=BETA, value_weight=0.5)
SHAPES = [
    RLOO3,
    GRPO3,
    replace(GRPO3, normalisation="token"),
    replace(GRPO3, normalisation="constant", length=7),
    replace(GRPO3, corrected_kl=True, beta=0.7),
    PPO3,
]


def signals(policy=POLICY, reference=REFERENCE, mask=MASK, weight=WEIGHT, now=VALUES, **given):
    def wide(x):
        return jnp.asarray(x, jnp.float32)

    fields = {name: wide(value) for name, value in (GIVEN | given).items()}
    mask = jnp.asarray(mask)
    responses = Responses(jnp.zeros(mask.shape, jnp.int32), mask, wide(weight), **fields)
    return Signals((wide(policy),), (wide(reference),), responses, ((0, 1, 2),), values=wide(now))


def advantages(objective):
    return {"advantages": EACH if isinstance(objective, PPO) else SEQUENCE}


def loss(objective, given):
    """The batch's loss, and its terms."""
    terms, weights = objective(given), objective.weights(given.responses)
    return sum(terms.sums[name] / weights[name] for name in terms.sums), terms


def clip(x, low, high):
    return min(max(x, low), high)


def surrogate(ratio, advantage):
    return -min(ratio * advantage, clip(ratio, 1 - EPS, 1 + EPS) * advantage)


def by_hand(objective, policy=POLICY, values=VALUES):
    """The batch's loss in float64."""
    total, sequences, count = 0.0, 0, 0
    for b, k in np.ndindex(LENGTHS.shape):
        n = LENGTHS[b, k]
        if not WEIGHT[b] or not n:
            continue
        sequences, count = sequences + 1, count + n
        lp, old, ref = policy[b, k, :n], OLD[b, k, :n], REFERENCE[b, k, :n]
        if isinstance(objective, RLOO):
            total += surrogate(np.exp(sum(lp - old)), SEQUENCE[b, k, 0])
        elif isinstance(objective, GRPO):
            each = []
            for t in range(n):
                ratio, d = np.exp(lp[t] - old[t]), ref[t] - lp[t]
                divergence = (np.exp(d) - d - 1) * (ratio if objective.corrected_kl else 1)
                each.append(surrogate(ratio, SEQUENCE[b, k, t]) + objective.beta * divergence)
            total += sum(each) / n if objective.normalisation == "sequence" else sum(each)
        else:
            for t in range(n):
                v, v_old, wanted = values[b, k, t], V_OLD[b, k, t], RETURNS[b, k, t]
                held = clip(v, v_old - 0.2, v_old + 0.2)
                total += surrogate(np.exp(lp[t] - old[t]), EACH[b, k, t])
                total += objective.value_weight * 0.5 * max((v - wanted) ** 2, (held - wanted) ** 2)
    if isinstance(objective, PPO) or getattr(objective, "normalisation", "") == "token":
        return total / count
    constant = getattr(objective, "normalisation", "") == "constant"
    return total / (sequences * objective.length if constant else sequences)


@pytest.mark.parametrize("objective", SHAPES, ids=str)
def test_the_loss_by_hand(objective):
    found, _ = loss(objective, signals(**advantages(objective)))
    assert float(found) == pytest.approx(by_hand(objective), rel=1e-5)


@pytest.mark.parametrize("objective", SHAPES, ids=str)
def test_gradients_by_finite_differences(objective):
    def ours(policy, values):
        return loss(objective, signals(policy, now=values, **advantages(objective)))[0]

    found = jax.jit(jax.grad(ours, (0, 1)))(jnp.asarray(POLICY), jnp.asarray(VALUES))
    arrays = [POLICY, VALUES]
    for which, each in enumerate(arrays if isinstance(objective, PPO) else arrays[:1]):
        assert np.abs(found[which]).max() > 1e-2 and not found[which][~MASK].any()
        for place in np.argwhere(MASK):
            bump = np.zeros(MASK.shape)
            bump[tuple(place)] = 1e-6
            moved = [[x + s * bump * (x is each) for x in arrays] for s in (1, -1)]
            slope = (by_hand(objective, *moved[0]) - by_hand(objective, *moved[1])) / 2e-6
            assert float(found[which][tuple(place)]) == pytest.approx(slope, rel=2e-3, abs=2e-6)


@pytest.mark.parametrize("objective", SHAPES, ids=str)
def test_the_metrics_by_hand(objective):
    _, terms = loss(objective, signals(**advantages(objective)))
    found = {name: float(total / weight) for name, (total, weight) in terms.metrics.items()}
    real = MASK & (WEIGHT > 0)[:, None, None]
    k1 = (POLICY - REFERENCE)[real]
    ratio, a = np.exp(POLICY - OLD)[real], advantages(objective)["advantages"][real]
    if isinstance(objective, RLOO):
        some = real.any(-1)
        ratio, a = np.exp((POLICY - OLD).sum(-1))[some], SEQUENCE[..., 0][some]
    expected = {
        "policy/nll": -POLICY[real].mean(),
        "kl/k1": k1.mean(),
        "kl/k2": (k1**2).mean() / 2,
        "kl/k3": (np.exp(-k1) + k1 - 1).mean(),
        "kl/sequence": k1.sum() / real.any(-1).sum(),
        "policy/ratio": ratio.mean(),
        "policy/clipped": (((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0))).mean(),
    }
    if isinstance(objective, PPO):
        error = ((VALUES - RETURNS) ** 2)[real]
        held = (np.clip(VALUES, V_OLD - 0.2, V_OLD + 0.2) - RETURNS)[real] ** 2
        expected |= {"value/error": error.mean(), "value/clipped": (held > error).mean()}
        assert 0 < expected["value/clipped"] < 1
    assert 0 < expected["policy/clipped"] < 1
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def leaves(terms, weights):
    return jax.tree.leaves((terms.sums, weights, terms.metrics))


def evaluated(objective, given):
    return leaves(objective(given), objective.weights(given.responses))


@pytest.mark.parametrize("objective", SHAPES, ids=str)
def test_padding_groups_that_only_fill_and_micro_batches(objective):
    names = ("policy", "reference", "mask", "now", *GIVEN)
    arrays = [POLICY, REFERENCE, MASK, VALUES, *(GIVEN | advantages(objective)).values()]
    whole = evaluated(objective, signals(**dict(zip(names, arrays, strict=True))))
    longer = [np.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=9) for x in arrays]
    longer[2][:, :, 6:] = False
    for found in (
        evaluated(objective, signals(**dict(zip(names, longer, strict=True)))),
        np.sum([evaluated(objective, part(names, arrays, at)) for at in ([0], [1, 2, 3])], axis=0),
        evaluated(objective, part(names, arrays, [0, 1, 3])),
    ):
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


def part(names, arrays, at):
    return signals(weight=WEIGHT[at], **{name: x[at] for name, x in zip(names, arrays, strict=True)})


@pytest.mark.parametrize("objective", SHAPES, ids=str)
def test_the_first_gradient_is_that_of_log_probs_times_advantages(objective):
    """The ratio is 1, and the divergence from the reference has no slope."""
    given = signals(OLD, OLD, **advantages(objective))

    def plain(policy):
        return loss(objective, replace(given, policy=(policy,)))[0]

    found = jax.grad(plain)(given.policy[0])
    each = advantages(objective)["advantages"] * WEIGHT[:, None, None]
    if getattr(objective, "normalisation", "") == "sequence":
        each = each / np.maximum(LENGTHS, 1)[..., None]
    weight = float(objective.weights(given.responses)["policy"])
    np.testing.assert_allclose(found, -each / weight, atol=1e-6)


@pytest.mark.parametrize("objective", SHAPES, ids=str)
@pytest.mark.parametrize("far", [-500.0, 500.0])
def test_extreme_ratios_stay_finite(objective, far):
    def ours(policy):
        return loss(objective, signals(policy, **advantages(objective)))[0]

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(POLICY + np.where(MASK, far, 0), jnp.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert np.isfinite(jnp.square(gradient).sum()), "the norm of the gradient"


@pytest.mark.parametrize("objective", SHAPES, ids=str)
def test_a_batch_without_its_rollout_is_refused(objective):
    given = signals()
    for name in objective.fields:
        bare = replace(given, responses=replace(given.responses, **{name: None}))
        with pytest.raises(ValueError, match=f"learns from rollouts; the batch has no {name}$"):
            objective(bare)
    with pytest.raises(ValueError, match="no reference"):
        objective(replace(given, reference=None))
    assert objective.fields == ("old", "advantages") + ("values", "returns") * isinstance(objective, PPO)


# ---- what rewards are worth --------------------------------------------------------------------------

REWARDS = np.array([[1.0, 2.0, 4.0], [0.0, np.nan, 1.0], [5.0, 5.0, 5.0], [1.0, -1.0, np.nan]])


def test_rloo_credits_a_response_with_what_it_is_above_its_siblings():
    (found,) = RLOO3.credit(REWARDS, MASK, OLD, REFERENCE).values()
    penalised = REWARDS - BETA * (OLD - REFERENCE).sum(-1)
    expected = penalised[0, 2] - penalised[0, :2].mean()
    np.testing.assert_allclose(found[0, 2], [expected, 0, 0, 0, 0, 0], rtol=1e-12)
    assert found[1, 0, 0] == pytest.approx(penalised[1, 0] - penalised[1, 2], rel=1e-12)
    assert not found[1, 1].any() and not found[~MASK].any()


def test_grpo_credits_without_the_divergence():
    (found,) = GRPO3.credit(REWARDS, MASK, OLD, REFERENCE).values()
    a = (1 - 7 / 3) / (np.std([1, 2, 4], ddof=1) + 1e-4)
    np.testing.assert_allclose(found[0, 0], [a, a, a, 0, 0, 0], rtol=1e-12)
    (plain,) = replace(GRPO3, by_deviation=False).credit(REWARDS, MASK, OLD, REFERENCE).values()
    assert plain[0, 0, 0] == pytest.approx(1 - 7 / 3) and not plain[1, 1].any() and not plain[2].any()


def test_ppo_credits_tokens_by_values():
    objective = replace(PPO3, gamma=0.9, gae_lambda=0.8)
    found = objective.credit(REWARDS, MASK, OLD, REFERENCE, V_OLD)
    scored = MASK & np.isfinite(REWARDS)[..., None]
    raw = np.zeros(MASK.shape)
    for b, k in np.argwhere(np.isfinite(REWARDS)):
        n, value, later = LENGTHS[b, k], 0.0, 0.0
        for t in reversed(range(n)):
            reward = REWARDS[b, k] * (t == n - 1) - BETA * (OLD - REFERENCE)[b, k, t]
            later = reward + 0.9 * value - V_OLD[b, k, t] + 0.9 * 0.8 * later
            value, raw[b, k, t] = V_OLD[b, k, t], later
    real = raw[scored]
    white = np.where(scored, (raw - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8), 0)
    np.testing.assert_allclose(found["advantages"], white, rtol=1e-10, atol=1e-12)
    returns = np.where(scored, raw + V_OLD, V_OLD)  # of what has no reward, what was said
    np.testing.assert_allclose(found["returns"], returns, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="values; none were given"):
        objective.credit(REWARDS, MASK, OLD, REFERENCE)


@pytest.mark.parametrize("objective", SHAPES, ids=str)
def test_what_padding_holds_does_not_matter(objective):
    junk = np.where(MASK, 0, 1e5)
    arrays = (OLD, REFERENCE, V_OLD)
    expected = objective.credit(REWARDS, MASK, *arrays)
    found = objective.credit(REWARDS, MASK, *(x + junk * (i + 1) for i, x in enumerate(arrays)))
    assert set(found) == set(objective.fields) - {"old", "values"}
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: RLOO(responses=1), "objective.responses is 1; it must be from 2 to 1024"),
        (lambda: GRPO(responses=1), "objective.responses is 1; it must be from 2 to 1024"),
        (lambda: PPO(responses=0), "objective.responses is 0; it must be from 1 to 1024"),
        (lambda: RLOO(beta=-1), "objective.beta is -1; it must be at least 0"),
        (lambda: RLOO(clip=float("nan")), "objective.clip is nan"),
        (lambda: GRPO(normalisation="mean"), "'mean'; it must be one of sequence, token, constant"),
        (lambda: GRPO(length=0), "objective.length is 0"),
        (lambda: GRPO(by_deviation=1), "objective.by_deviation is no bool"),  # type: ignore[arg-type]
        (lambda: PPO(gamma=1.5), "objective.gamma is 1.5; it must be from 0 to 1"),
        (lambda: PPO(gae_lambda=-0.5), "objective.gae_lambda is -0.5"),
        (lambda: PPO(value_weight=-1), "objective.value_weight is -1"),
    ],
)
def test_settings_are_checked(make, said):
    with pytest.raises(InputError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)
