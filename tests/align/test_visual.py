"""Objectives on two images against float64 arithmetic written out from their formulas."""

from dataclasses import dataclass, replace
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from refusals import refusal

from mllm_align import DPO, KTO, MDPO, RDPO, SFT, Averaged, CHiP, Config, Part, Sum, Visual
from mllm_align.align.checks import check_terms
from mllm_align.align.contract import Objective, Signals
from mllm_align.batch import Responses
from mllm_align.config import from_json, to_json

LENGTHS = np.array([[3, 5], [6, 1], [2, 2], [4, 6]])
MASK = np.arange(6) < LENGTHS[:, :, None]
MASKS = MASK, MASK[:, :1]
RNG = np.random.default_rng(7)
POLICY, REFERENCE = ([np.where(mask, -5 * RNG.random(mask.shape), 0) for mask in MASKS] for _ in range(2))
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])
VIEWS = ((0, 1), (0,))
EVERY = [Visual(0.3), RDPO(0.3), MDPO(0.3)]


def given(policy=POLICY, reference=REFERENCE, which=slice(None), wider=0):
    """Signals of some groups, with more padding."""

    def array(x):
        return jnp.pad(jnp.asarray(x, jnp.float32)[which], ((0, 0), (0, 0), (0, wider)))

    mask = np.pad(MASK[which], ((0, 0), (0, 0), (0, wider)))
    responses = Responses(jnp.zeros(mask.shape, jnp.int32), mask, jnp.asarray(WEIGHT[which], jnp.float32))
    policy, reference = (tuple(map(array, each)) for each in (policy, reference))
    return Signals(policy, reference, responses, VIEWS)


def terms(objective, signals):
    return objective(signals.of(objective))


def loss(objective, signals):
    weights = objective.weights(signals.responses)
    return sum(total / weights[name] for name, total in terms(objective, signals).sums.items())


def by_hand(policy, beta=0.3):
    """The loss of each term."""
    ratios = [(mine - other).sum(-1) for mine, other in zip(policy, REFERENCE, strict=True)]
    chosen, rejected, other = ratios[0][:, 0], ratios[0][:, 1], ratios[1][:, 0]
    margins = {"pairs": chosen - rejected, "image": chosen - other, "anchor": chosen}
    return {name: (np.log1p(np.exp(-beta * x)) * WEIGHT).sum() / 3 for name, x in margins.items()}


def expected(objective, policy=POLICY):
    names = {Visual: ("image",), RDPO: ("pairs", "image"), MDPO: ("pairs", "image", "anchor")}
    each = by_hand(policy)
    return {name: each[name] for name in names[type(objective)]}


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_losses_of_every_term(objective):
    sums, weights = terms(objective, given()).sums, objective.weights(given().responses)
    found = {name: float(total) / float(weights[name]) for name, total in sums.items()}
    assert found == pytest.approx(expected(objective), rel=1e-5)
    assert {float(value) for value in weights.values()} == {3}
    check_terms(objective)


@pytest.mark.parametrize(
    "objective, first", [(Visual(), log(2)), (RDPO(), 2 * log(2)), (MDPO(), 3 * log(2))], ids=str
)
def test_a_policy_that_is_its_reference_begins_at_multiples_of_ln_2(objective, first):
    start = given(policy=REFERENCE)
    assert float(loss(objective, start)) == pytest.approx(first, rel=1e-6)
    assert float(terms(objective, start).metrics["rewards/visual_accuracy"][0]) == 0


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_figures_of_the_images(objective):
    metrics = terms(objective, given()).metrics
    rewards = [0.3 * (mine - other).sum(-1)[:, 0] for mine, other in zip(POLICY, REFERENCE, strict=True)]
    wanted = {
        "rewards/chosen": rewards[0],
        "rewards/rejected_image": rewards[1],
        "rewards/visual_margin": rewards[0] - rewards[1],
        "rewards/visual_accuracy": rewards[0] > rewards[1],
        "logps/rejected_image": POLICY[1].sum(-1)[:, 0],
    }
    assert 0 < (wanted["rewards/visual_accuracy"] * WEIGHT).sum() < 3
    for name, value in wanted.items():
        total, count = metrics[name]
        assert float(total) == pytest.approx((value * WEIGHT).sum(), rel=1e-5, abs=1e-5)
        assert float(count) == 3
    assert ("rewards/accuracy" in metrics) == (objective.responses == 2)


def test_gradients_by_finite_differences():
    """Of mDPO, which has the terms of all."""
    objective = MDPO(0.3)
    gradient = jax.grad(lambda policy: loss(objective, given(policy)))
    found = gradient([jnp.asarray(x, jnp.float32) for x in POLICY])
    for view, mask in enumerate(MASKS):
        for place in np.argwhere(mask):
            bumped = []
            for step in (1e-6, -1e-6):
                policy = [x.copy() for x in POLICY]
                policy[view][tuple(place)] += step
                bumped.append(sum(expected(objective, policy).values()))
            slope = (bumped[0] - bumped[1]) / 2e-6
            assert float(found[view][tuple(place)]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_padding_micro_batches_and_groups_of_weight_zero_change_nothing():
    objective = MDPO(0.3)
    whole = terms(objective, given())
    parts = [terms(objective, given(which=slice(*each))) for each in ((0, 1), (1, 4))]
    others = [
        terms(objective, given(wider=4)),
        terms(objective, given(which=np.array([0, 1, 3]))),
        jax.tree.map(jnp.add, *parts),
    ]
    for other in others:
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- CHiP --------------------------------------------------------------------------------------------

CHANGED = MASK & (RNG.random(MASK.shape) < 0.5)
KL = np.where(MASK, RNG.random(MASK.shape), 0)


def chips(policy=POLICY, kl=KL):
    """What CHiP sees."""
    signals = given(policy)
    responses = replace(signals.responses, changed=jnp.asarray(CHANGED))
    return replace(signals, responses=responses, kl=jnp.asarray(kl, jnp.float32))


def chip_by_hand(policy, kl, kl_chosen=KL):
    """With segments counted twice. kl_chosen: where it is a constant."""
    weights = np.where(CHANGED, 2, 1)
    own, other = (
        ((mine - his) * each).sum(-1)
        for mine, his, each in zip(policy, REFERENCE, (weights, weights[:, :1]), strict=True)
    )
    divergence = kl[:, 1].sum(-1) - kl_chosen[:, 0].sum(-1)
    margin = own[:, 0] - own[:, 1] + own[:, 0] - other[:, 0] - 0.5 * divergence
    return (np.log1p(np.exp(-0.3 * margin)) * WEIGHT).sum() / 3


CHIP = CHiP(beta=0.3, alpha=0.5, segment_weight=2.0)


def test_chip_by_hand_and_its_gradient_by_finite_differences():
    def loss(policy, kl):
        return CHIP(chips(policy, kl)).sums["pairs"] / 3

    wide = [jnp.asarray(x, jnp.float32) for x in POLICY], jnp.asarray(KL, jnp.float32)
    value, found = jax.value_and_grad(loss, argnums=(0, 1))(*wide)
    assert float(value) == pytest.approx(chip_by_hand(POLICY, KL), rel=1e-5)
    assert CHANGED.any() and float(value) != pytest.approx(chip_by_hand(REFERENCE, KL), rel=1e-3)
    arrays = [*POLICY, KL]
    for number, (array, slopes) in enumerate(zip(arrays, [*found[0], found[1]], strict=True)):
        for place in np.argwhere(np.ones(array.shape, bool)):
            bumped = []
            for step in (1e-6, -1e-6):
                each = [x.copy() for x in arrays]
                each[number][tuple(place)] += step
                bumped.append(chip_by_hand(each[:2], each[2]))
            slope = (bumped[0] - bumped[1]) / 2e-6
            assert float(slopes[tuple(place)]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert not np.asarray(found[1])[:, 0].any(), "the chosen response's divergence is a constant"


def test_chip_begins_at_ln_2_and_logs_its_figures():
    start = CHIP(chips(REFERENCE, 0 * KL))
    assert float(start.sums["pairs"]) == pytest.approx(3 * log(2), rel=1e-6)
    metrics = CHIP(chips()).metrics
    assert float(metrics["kl/rejected"][0]) == pytest.approx((KL[:, 1].sum(-1) * WEIGHT).sum(), rel=1e-5)
    assert {
        "rewards/margin",
        "rewards/visual_accuracy",
        "kl/chosen",
        "logps/rejected_image",
    } <= metrics.keys()
    check_terms(CHIP)


def test_what_chip_refuses():
    assert "objective.segment_weight is -1" in refusal(lambda: CHiP(segment_weight=-1))
    assert "chip can't be part of a sum" in refusal(lambda: Sum((Part(CHiP()), Part(SFT()))))
    stored = refusal(lambda: Config(objective=CHiP(), reference="stored"))
    assert "live: CHiP compares with all of the reference's distributions" in stored


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
    objective = Sum(tuple(Part(each) for each in (MDPO(0.3), RDPO(0.2, "crop"), Visual(0.1))))
    twice = given(which=np.array([*range(4)] * 2))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(twice, NamedSharding(mesh, PartitionSpec("data")))
    assert len(spread.weight.devices()) == 8
    found, wanted = (jax.jit(objective)(each, {}).sums for each in (spread, twice))
    assert found.keys() == wanted.keys() and len(found) == 6
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)


# ---- sums --------------------------------------------------------------------------------------------


def test_mdpo_is_a_sum_and_part_of_sums():
    """Of its terms by their weights; beside parts that see the record's own image alone."""
    signals, parts = given(), by_hand(POLICY)
    both = Sum((Part(DPO(0.3)), Part(Visual(0.3), 0.5)))
    assert both.views == VIEWS and both.rejected_image == "crop" and both.responses == 2
    assert float(loss(both, signals)) == pytest.approx(parts["pairs"] + 0.5 * parts["image"], rel=1e-5)
    with_sft = Sum((Part(MDPO(0.3), 2.0), Part(SFT())))
    found, weights = with_sft(signals).sums, with_sft.weights(signals.responses)
    assert {"mdpo/pairs", "mdpo/image", "mdpo/anchor", "sft"} == found.keys() == weights.keys()
    nll = -(POLICY[0][:, 0].sum(-1) * WEIGHT).sum() / 13
    assert float(loss(with_sft, signals)) == pytest.approx(2 * sum(parts.values()) + nll, rel=1e-5)
    assert Sum((Part(KTO()), Part(Visual()))).views == ((0, 1, 2, 3), (0,))
    assert Sum((Part(Averaged()), Part(Visual()))).held_out.views == VIEWS
    config = Config(objective=both)
    assert from_json(to_json(config)) == config


# ---- what is refused ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turned(MDPO):
    @property
    def views(self):
        return ((0, 1), (1,))


@dataclass(frozen=True)
class Scored(Objective):
    responses = 2
    needs = frozenset({"score"})
    rejected_image = "crop"


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: MDPO(beta=-1), "objective.beta is -1"),
        (lambda: Config(objective=MDPO(rejected_image="blur")), "objective.rejected_image is 'blur'"),  # type: ignore[arg-type]
        (lambda: Config(objective=Turned()), "has the views ((0, 1), (1,)); batches have ((0, 1), (0,))"),
        (lambda: Config(objective=Scored()), "has a rejected image and needs score; keep one"),
        (
            lambda: Sum((Part(MDPO()), Part(RDPO()))),
            "different rejected images (mdpo crop, rdpo record); give all of them one",
        ),
    ],
)
def test_nonsense_is_refused(make, said):
    assert said in refusal(make)


def test_they_need_a_reference():
    with pytest.raises(ValueError, match="reference"):
        Visual()(replace(given(), reference=None).of(Visual()))
