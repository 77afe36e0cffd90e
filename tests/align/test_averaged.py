"""The averaged loss over (y+, y-, y~-), against float64 arithmetic written out from Eq. 5."""

import numpy as np
import pytest
from signals import computed, signals

from mllm_align.align.pairwise import DPO, IPO, Averaged, SLiC

LENGTHS = np.array([[3, 5, 2], [6, 1, 4], [2, 2, 6], [4, 6, 0]])  # the last group has no y~-
MASK = np.arange(6) < LENGTHS[:, :, None]
RNG = np.random.default_rng(4)
POLICY, REFERENCE = (np.where(MASK, -5 * RNG.random(MASK.shape), 0) for _ in range(2))
WEIGHT = np.array([1.0, 1.0, 0.0, 1.0])
LOSSES = {
    DPO(beta=0.3): lambda h, g: np.log1p(np.exp(-0.3 * h)),
    SLiC(beta=0.5): lambda h, g: np.maximum(0, 1 - 0.5 * h),
    IPO(beta=0.25): lambda h, g: (g - 2) ** 2,
}


def logps(policy=POLICY, mask=MASK):
    return signals(policy, REFERENCE, mask, WEIGHT)


def each(pair, rejected):
    """The loss of every group's (y+, rejected)."""
    ratios = (POLICY - REFERENCE).sum(-1)
    per_token = ratios / np.maximum(LENGTHS, 1)
    h, g = (x[:, 0] - x[:, rejected] for x in (ratios, per_token))
    return LOSSES[pair](h, g)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("pair", LOSSES, ids=str)
def test_both_rejected_responses_count(pair, gamma):
    total, weight, metrics = computed(Averaged(pair=pair, gamma=gamma), logps())
    data, own = each(pair, 1), each(pair, 2)
    wanted = gamma * data + (1 - gamma) * own
    wanted[3] = data[3]  # nothing to average with
    assert float(weight) == 3
    assert float(total) == pytest.approx((wanted * WEIGHT).sum(), rel=1e-5)
    margins = pair.beta * (POLICY - REFERENCE).sum(-1)
    margins = margins[:, :1] - margins[:, 1:]
    if 0 < gamma < 1:
        value, count = (float(x) for x in metrics["policy/rewards/margin"])
        assert value / count == pytest.approx(margins[:2, 1].mean(), rel=1e-5)
        share = np.array([gamma, gamma, 1.0])
        value, count = (float(x) for x in metrics["rewards/margin"])
        assert value / count == pytest.approx((margins[[0, 1, 3], 0] * share).sum() / share.sum(), rel=1e-5)
