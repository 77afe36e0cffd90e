"""MRPO against float64 arithmetic written out from its formula."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refusal

from mllm_align import DPO, MRPO, SFT, Averaged, Config, OnlinePairs, Part, Scorer, Sum
from mllm_align.align.checks import check_terms
from mllm_align.align.contract import Signals
from mllm_align.batch import Responses
from mllm_align.config import from_json, to_json

LENGTHS = np.array([[3, 5], [6, 1], [2, 2], [4, 6]])
MASK = np.arange(6) < LENGTHS[:, :, None]
RNG = np.random.default_rng(11)
POLICY, REFERENCE = (np.where(MASK, -5 * RNG.random(MASK.shape), 0) for _ in range(2))
# near the first, so that some are within the clipping and some are not
OTHERS = REFERENCE[:, None] * (1 + 0.3 * (RNG.random((4, 2, *MASK.shape[1:])) - 0.5))
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])
NAMES = "a", "b"


def given(policy=POLICY, others=OTHERS):
    policy, reference, others, weight = (
        jnp.asarray(x, jnp.float32) for x in (policy, REFERENCE, others, WEIGHT)
    )
    responses = Responses(jnp.zeros(MASK.shape, jnp.int32), MASK, weight, references=others)
    return Signals((policy,), (reference,), responses, ((0, 1),))


@partial(jax.jit, static_argnums=0)
def loss(objective, signals):
    return objective(signals).sums["pairs"] / objective.weights(signals.responses)["pairs"]


def by_hand(policy=POLICY, others=OTHERS, clip=0.1, adaptive=True, swapped=False):
    """beta 0.3. swapped: the weights of two references in each other's place, as in the released code."""
    losses, held = [], []
    for row in range(4):
        each = [[logps[row, y].sum() for y in (0, 1)] for logps in (REFERENCE, *others.swapaxes(0, 1))]
        confidence = [abs(chosen - rejected) for chosen, rejected in each]
        shares = [c / sum(confidence) if adaptive else 1 / len(each) for c in confidence]
        shares = shares[::-1] if swapped else shares
        mean = [sum(logps[y] for logps in each) / len(each) for y in (0, 1)]
        ratios = []
        for y in (0, 1):
            reach = clip * abs(mean[y]) / (abs(mean[0]) + abs(mean[1]))
            low, high = each[0][y] * (1 + reach), each[0][y] * (1 - reach)
            near = [each[0][y], *(min(max(logps[y], low), high) for logps in each[1:])]
            held += [after != before[y] for after, before in zip(near, each, strict=True)]
            mixed = -np.log(sum(share / np.exp(logp) for share, logp in zip(shares, near, strict=True)))
            ratios.append(policy[row, y].sum() - mixed)
        losses.append(np.log1p(np.exp(-0.3 * (ratios[0] - ratios[1]))) * WEIGHT[row])
    return sum(losses) / 3, held


@pytest.mark.parametrize("settings", [{}, {"clip": 0.02}, {"adaptive": False}])
def test_by_hand(settings):
    wanted, held = by_hand(**settings)
    assert any(held) and not all(held)
    assert float(loss(MRPO(0.3, references=NAMES, **settings), given())) == pytest.approx(wanted, rel=1e-5)


def test_the_released_code_has_the_weights_in_each_others_place():
    """It takes p1 p2 / (a p2 + (1 - a) p1), a the share of p2: that is 1 / (a / p1 + (1 - a) / p2)."""
    one = OTHERS[:, :1]
    mine, theirs = by_hand(others=one)[0], by_hand(others=one, swapped=True)[0]
    found = float(loss(MRPO(0.3, references=NAMES[:1]), given(others=one)))
    assert found == pytest.approx(mine, rel=1e-5) and abs(mine - theirs) > 1e-4


def test_equal_references_are_dpo():
    same = np.repeat(REFERENCE[:, None], 2, 1)
    mine = MRPO(0.3, sft_weight=0.5, references=NAMES)(given(others=same))
    theirs = DPO(0.3, sft_weight=0.5)(given())
    for one, other in zip(*map(jax.tree.leaves, (mine, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6)


def test_gradient_by_finite_differences():
    found = jax.grad(lambda policy: loss(MRPO(0.3, references=NAMES), given(policy)))(
        jnp.asarray(POLICY, jnp.float32)
    )
    for place in np.argwhere(MASK):
        up, down = POLICY.copy(), POLICY.copy()
        up[tuple(place)] += 1e-6
        down[tuple(place)] -= 1e-6
        slope = (by_hand(up)[0] - by_hand(down)[0]) / 2e-6
        assert float(found[tuple(place)]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_references_that_say_nothing_are_finite():
    """Of a group that is all padding."""
    empty = replace(given(0 * POLICY, 0 * OTHERS), reference=(jnp.zeros(POLICY.shape, jnp.float32),))
    assert float(loss(MRPO(references=NAMES), empty)) == pytest.approx(np.log(2), rel=1e-6)


def test_what_it_refuses():
    assert "objective.references is empty; name folders" in refusal(lambda: check_terms(MRPO()))
    assert "objective.clip is 1; it must be at least 0 and below 1" in refusal(lambda: MRPO(clip=1))
    assert "objective.references is 'a'" in refusal(lambda: Config(objective=MRPO(references="a")))
    objective = MRPO(references=NAMES)
    check_terms(objective)
    assert "mrpo can't be part of a sum" in refusal(lambda: Sum((Part(objective), Part(SFT()))))
    assert "must be one with one reference" in refusal(lambda: Averaged(objective))
    online = OnlinePairs(annotator=Scorer(function="votes:short"))
    said = refusal(lambda: Config(objective=objective, online=online))
    assert "or --online none: other references" in said


def test_a_config_with_references_is_saved_and_read():
    config = Config(objective=MRPO(references=NAMES, clip=0.2))
    assert from_json(to_json(config)) == config
