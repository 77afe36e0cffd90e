"""Objectives against float64 arithmetic written out from their formulas."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from signals import computed, signals

from mllm_align import Config
from mllm_align.align.absolute import APO, BCO, KTO
from mllm_align.align.checks import check_terms
from mllm_align.align.pairwise import DPO, EXO, IPO, Averaged, RobustDPO, SLiC
from mllm_align.align.reference_free import CPO, ORPO, SimPO
from mllm_align.align.sft import SFT
from mllm_align.align.weighted import Part, Sum
from mllm_align.errors import InputError

# Two responses of every record, then two of another one.
LENGTHS = np.array([[3, 5, 2, 1], [6, 1, 4, 3], [2, 2, 3, 5], [4, 6, 1, 2]])
EVERY_MASK = np.arange(6) < LENGTHS[:, :, None]
MASK = EVERY_MASK[:, :2]
RNG = np.random.default_rng(3)
POLICY, REFERENCE = (np.where(MASK, -5 * RNG.random(MASK.shape), 0) for _ in range(2))
OTHERS = (np.where(EVERY_MASK[:, 2:], -5 * RNG.random(MASK.shape), 0) for _ in range(2))
EVERY_POLICY, EVERY_REFERENCE = (
    np.concatenate(each, 1) for each in zip((POLICY, REFERENCE), OTHERS, strict=True)
)
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])
STATES = {BCO: {"mean": jnp.float32(0.25), "count": jnp.float32(6)}, KTO: {"z": jnp.float32(0.75)}}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    """-log sigmoid(-x)"""
    return np.log1p(np.exp(x))


def odds(m):
    return np.exp(m) / (1 - np.exp(m))


def divergence(q, e):
    return q * np.log(q / (1 - e)) + (1 - q) * np.log((1 - q) / e)


# The loss of a pair, and what the loss of y+'s tokens counts beside it. u: log-ratios, h their difference;
# g the difference of log-ratios per token; p: log-probabilities of y+ and y-; m: per token.
BY_HAND = [
    (DPO(), lambda x: softplus(-0.1 * x.h), 0),
    (DPO(beta=0.5), lambda x: softplus(-0.5 * x.h), 0),
    (DPO(0.5, 0.2), lambda x: 0.8 * softplus(-0.5 * x.h) + 0.2 * softplus(0.5 * x.h), 0),
    (DPO(5.0, length_normalised=True), lambda x: softplus(-5 * x.g), 0),
    (RobustDPO(0.5, 0.2), lambda x: (0.8 * softplus(-0.5 * x.h) - 0.2 * softplus(0.5 * x.h)) / 0.6, 0),
    (IPO(beta=0.25), lambda x: (x.g - 2) ** 2, 0),
    (IPO(beta=0.25, length_normalised=False), lambda x: (x.h - 2) ** 2, 0),
    (SLiC(beta=0.5), lambda x: np.maximum(0, 1 - 0.5 * x.h), 0),
    (EXO(0.5), lambda x: divergence(sigmoid(0.5 * x.h), 1e-3), 0),
    (BCO(0.3), lambda x: softplus(0.25 - 0.3 * x.u[0]) + softplus(0.3 * x.u[1] - 0.25), 0),
    (APO(0.3), lambda x: 1 - sigmoid(0.3 * x.u[0]) + sigmoid(0.3 * x.u[1]), 0),
    (APO(0.3, "down"), lambda x: sigmoid(0.3 * x.u[0]) + 1 - sigmoid(0.3 * x.h), 0),
    (SimPO(2.0, 0.5), lambda x: softplus(0.5 - 2 * (x.m[0] - x.m[1])), 0),
    (CPO(0.2, 0.5), lambda x: softplus(-0.2 * (x.p[0] - x.p[1])), 0.5),
    (ORPO(0.3), lambda x: 0.3 * softplus(np.log(odds(x.m[1]) / odds(x.m[0]))), 1),
    (
        KTO(0.3, 1.5),
        lambda x: (1.5 * sigmoid(0.3 * (0.75 - x.u[0])) + sigmoid(0.3 * (x.u[1] - 0.75))) / 2,
        0,
    ),
]
IDS = [str(objective) for objective, *_ in BY_HAND]
FREE = (SimPO, CPO, ORPO)
RELATIVE = [objective for objective, *_ in BY_HAND if not isinstance(objective, FREE)]
EVERY = [objective for objective, *_ in BY_HAND] + [SFT()]


def logps(policy=POLICY, reference=REFERENCE, mask=MASK, weight=WEIGHT):
    return signals(policy, reference, mask, weight)


def given(objective, policy=None, which=slice(None), wider=0):
    """The groups that an objective takes; its own responses may have another policy."""
    arrays = EVERY_POLICY, EVERY_REFERENCE, EVERY_MASK
    arrays = [np.pad(x[which], ((0, 0), (0, 0), (0, wider))) for x in arrays]
    arrays = [x[:, : max(2, objective.responses)] for x in arrays]
    if policy is not None:
        arrays[0] = jnp.concatenate([policy, jnp.asarray(arrays[0], jnp.float32)[:, 2:]], 1)
    return logps(*arrays, WEIGHT[which])


def added(objective, signals):
    """Sums, weights, metrics and stats."""
    terms = objective(signals, STATES.get(type(objective), ()))
    return terms.sums, objective.weights(signals.responses), terms.metrics, terms.stats


def loss(objective, signals):
    sums, weights, *_ = added(objective, signals)
    return sum(sums[name] / weights[name] for name in sums)


def assert_same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def by_hand(formula, share, policy):
    """The loss: the mean over pairs, and over the chosen tokens of all."""
    ratios, p = (policy - REFERENCE).sum(-1), policy.sum(-1)
    u, g, p, m = (x.T for x in (ratios, ratios / LENGTHS[:, :2], p, p / LENGTHS[:, :2]))
    pairs = (formula(SimpleNamespace(u=u, h=u[0] - u[1], g=g[0] - g[1], p=p, m=m)) * WEIGHT).sum() / 3
    return pairs - share * (p[0] * WEIGHT).sum() / (3 + 6 + 4)


@pytest.mark.parametrize("objective, formula, share", BY_HAND, ids=IDS)
def test_losses_and_figures(objective, formula, share):
    _, weights, metrics, _ = added(objective, given(objective))
    counts = {"pairs": 3, "responses": 6, "nll": 3 + 6 + 4}
    assert all(float(value) == counts[name] for name, value in weights.items())
    assert ("nll" in weights) == (share > 0)
    found, expected = loss(objective, given(objective)), by_hand(formula, share, POLICY)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    p = POLICY.sum(-1)
    scores = p - REFERENCE.sum(-1)
    if isinstance(objective, FREE):
        scores = p if isinstance(objective, CPO) else p / LENGTHS[:, :2]
    reward = objective.beta * scores
    margin = reward[:, 0] - reward[:, 1]
    expected = {
        "rewards/chosen": reward[:, 0],
        "rewards/rejected": reward[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": margin > 0,
        "logps/chosen": POLICY[:, 0].sum(-1),
        "logps/rejected": POLICY[:, 1].sum(-1),
    }
    assert expected.keys() <= metrics.keys() <= expected.keys() | {"rewards/delta", "kl/mismatched"}
    if isinstance(objective, DPO):
        assert 0 < (expected["rewards/accuracy"] * WEIGHT).sum() < 3
    for name, wanted in expected.items():
        value, count = metrics[name]
        assert float(count) == 3
        assert float(value) == pytest.approx((wanted * WEIGHT).sum(), rel=1e-5), name


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


@pytest.mark.parametrize("objective, formula, share", BY_HAND, ids=IDS)
def test_gradients_by_finite_differences(objective, formula, share):
    gradient = jax.grad(lambda p: loss(objective, given(objective, p)))
    found = gradient(jnp.asarray(POLICY, jnp.float32))
    for place in np.argwhere(MASK):
        bump = np.zeros(MASK.shape)
        bump[tuple(place)] = 1e-6
        slope = by_hand(formula, share, POLICY + bump) - by_hand(formula, share, POLICY - bump)
        assert float(found[tuple(place)]) == pytest.approx(slope / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_padding_and_groups_of_weight_zero_change_nothing(objective):
    expected = added(objective, given(objective))
    assert_same(added(objective, given(objective, wider=4)), expected)
    assert_same(added(objective, given(objective, which=np.array([0, 1, 3]))), expected)


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_sums_of_micro_batches_add_up(objective):
    parts = [added(objective, given(objective, which=slice(*each))) for each in ((0, 1), (1, 4))]
    *sums, metrics, stats = jax.tree.map(jnp.add, *parts)
    *expected, theirs, last = added(objective, given(objective))
    assert_same((sums, stats), (expected, last))
    assert_same(*({name: value / count for name, (value, count) in x.items()} for x in (metrics, theirs)))


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
    """One group a device; all objectives at once, as parts of a sum."""
    parts = {type(each): Part(each) for each in EVERY}
    objective = Sum(tuple(parts.values()))
    state = {part.name: STATES[kind] for kind, part in parts.items() if kind in STATES}
    twice = given(KTO(), which=np.array([*range(4)] * 2))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(twice, NamedSharding(mesh, PartitionSpec("data")))
    assert len(spread.weight.devices()) == 8
    found = jax.jit(lambda given, state: (objective(given, state), objective.weights(given.responses)))
    assert_same(found(spread, state), found(twice, state))


def test_no_label_smoothing_is_plain_dpo():
    assert_same(
        computed(RobustDPO(beta=0.3, label_smoothing=0.0), logps()), computed(DPO(beta=0.3), logps())
    )
    assert_same(computed(DPO(beta=0.3, label_smoothing=0.0), logps()), computed(DPO(beta=0.3), logps()))


@pytest.mark.parametrize("ratio", [-1e5, 1e5])
@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_extreme_ratios_stay_finite(objective, ratio):
    far = jnp.asarray(np.where(MASK, np.array([ratio, 0.0])[:, None], 0.0), jnp.float32)
    value, gradient = jax.value_and_grad(lambda p: loss(objective, given(objective, p)))(far)
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
        (lambda: EXO(label_smoothing=0.0), ["objective.label_smoothing", "0", "at least 1e-09"]),
        (lambda: BCO(beta=-1), ["objective.beta", "-1"]),
        (lambda: APO(form="up"), ["objective.form is 'up'", "one of zero, down"]),  # type: ignore[arg-type]
        (lambda: SimPO(gamma=-1), ["objective.gamma", "-1"]),
        (lambda: CPO(sft_weight=-1), ["objective.sft_weight", "-1"]),
        (lambda: KTO(undesirable_weight=-1), ["objective.undesirable_weight", "-1"]),
        (lambda: DPO(length_normalised=1), ["objective.length_normalised is no bool"]),  # type: ignore[arg-type]
    ],
)
def test_invalid_settings_are_refused(make, words):
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_who_needs_a_reference():
    assert all(objective.needs == {"reference"} for objective in RELATIVE)
    assert all(objective.of_record == 2 for objective in EVERY[:-1])
    assert not SFT.needs and SFT.responses == 1
    for objective in RELATIVE:
        with pytest.raises(ValueError, match=f"{type(objective).__name__}.*reference"):
            objective(replace(given(objective), reference=None), STATES.get(type(objective), ()))
    free = SimPO(), CPO(), ORPO(), SFT(), Sum((Part(SimPO()), Part(SFT())))
    for objective in free:
        config = Config(objective=objective)
        assert not objective.needs and not config.live_reference and not config.stored_reference
        assert np.isfinite(loss(objective, logps(reference=None)))


# ---- states ------------------------------------------------------------------------------------------


def test_bco_keeps_the_mean_of_all_rewards():
    """Of 6 rewards before, whose mean is 0.25, and of the 6 of this step."""
    objective, before = BCO(0.3), STATES[BCO]
    terms = objective(given(objective), before)
    rewards = 0.3 * (POLICY - REFERENCE).sum(-1)
    after = objective.update(before, terms.stats)
    total = 6 * 0.25 + (rewards * WEIGHT[:, None]).sum()
    assert (float(after["mean"]), float(after["count"])) == (pytest.approx(total / 12, rel=1e-5), 12)
    assert [float(x) for x in terms.metrics["rewards/delta"]] == [0.25, 1]
    assert {name: float(x) for name, x in objective.init_state().items()} == {"mean": 0, "count": 0}


def test_kto_keeps_the_divergence_on_responses_of_other_records():
    objective, before = KTO(0.3), STATES[KTO]
    ratios = (EVERY_POLICY - EVERY_REFERENCE).sum(-1)[:, 2:]
    higher = given(objective)
    found = objective(higher, before)
    mean = (ratios * WEIGHT[:, None]).sum() / 6
    assert float(found.metrics["kl/mismatched"][0]) / 6 == pytest.approx(mean, rel=1e-5)
    turned = replace(higher, policy=higher.reference, reference=higher.policy)
    z = [float(objective.update(before, objective(x, before).stats)["z"]) for x in (higher, turned)]
    assert sorted(z) == [0, pytest.approx(abs(mean), rel=1e-5)], "the mean log-ratio, at least 0"
    none = replace(higher, responses=replace(higher.responses, weight=jnp.zeros(4)))
    assert float(objective.update(before, objective(none, before).stats)["z"]) == 0.75, "nothing was seen"
    at_others = jax.grad(lambda p: objective(replace(higher, policy=(p,)), before).sums["responses"])
    assert not np.asarray(at_others(higher.policy[0]))[:, 2:].any()


def test_kto_takes_responses_without_their_pair():
    """An empty response is not there; the loss is the mean over the others."""
    objective, mask = KTO(0.3, 1.5, 0.5), EVERY_MASK.copy()
    mask[0, 1] = mask[1, 0] = False
    policy, reference = (np.where(mask, x, 0) for x in (EVERY_POLICY, EVERY_REFERENCE))
    u = (policy - reference).sum(-1)
    each = 1.5 * sigmoid(0.3 * (0.75 - u[:, 0])), 0.5 * sigmoid(0.3 * (u[:, 1] - 0.75))
    unpaired = logps(policy, reference, mask)
    expected = (each[0][[0, 3]].sum() + each[1][[1, 3]].sum()) / 4
    assert float(loss(objective, unpaired)) == pytest.approx(expected, rel=1e-5)
    metrics = added(objective, unpaired)[2]
    assert [float(metrics[f"rewards/{name}"][1]) for name in ("chosen", "rejected", "margin")] == [2, 2, 1]
