"""Rewards, baselines and advantages, against figures and loops written out by hand."""

import numpy as np
import pytest

from mllm_align.align.advantages import (
    explained_variance,
    generalised_advantages,
    group_normalised,
    leave_one_out,
    per_token,
    scaled,
    sequence_penalty,
    token_rewards,
    whitened,
    without_end,
)

NAN, INF = np.nan, np.inf
LENGTHS = np.array([[3, 1], [5, 4], [0, 2]])
MASK = np.arange(5) < LENGTHS[:, :, None]
RNG = np.random.default_rng(5)
OLD, REFERENCE = (np.where(MASK, -4 * RNG.random(MASK.shape), 0) for _ in range(2))
JUNK = np.where(MASK, 0, 1e6)  # whatever padding holds does not count


def test_scaling_and_the_penalty_for_no_end():
    assert scaled([[3.0, NAN]], 1.0, 4.0)[0, 0] == 0.5 and np.isnan(scaled([[3.0, NAN]], 1.0, 4.0)[0, 1])
    assert without_end([[3.0, 1.0]], [[True, False]], 2.5).tolist() == [[3.0, -1.5]]


def test_the_penalty_of_a_response_is_the_sum_over_its_tokens():
    rewards = np.array([[1.0, 2.0], [0.5, NAN], [0.0, -1.0]])
    found = sequence_penalty(rewards, MASK, OLD + JUNK, REFERENCE, 0.3)
    for b, k in np.ndindex(rewards.shape):
        n = LENGTHS[b, k]
        expected = rewards[b, k] - 0.3 * sum(OLD[b, k, :n] - REFERENCE[b, k, :n])
        np.testing.assert_allclose(found[b, k], expected, rtol=1e-12)


def test_token_rewards_end_with_the_response():
    rewards = np.array([[1.0, 2.0], [0.5, 4.0], [9.0, -1.0]])
    found = token_rewards(rewards, MASK, OLD + JUNK, REFERENCE, 0.3)
    for b, k in np.ndindex(rewards.shape):
        n, expected = LENGTHS[b, k], np.zeros(5)
        expected[:n] = -0.3 * (OLD[b, k, :n] - REFERENCE[b, k, :n])
        if n:
            expected[n - 1] += rewards[b, k]
        np.testing.assert_allclose(found[b, k], expected, rtol=1e-12)


def test_leave_one_out_by_hand():
    rewards = [[1.0, 2.0, 6.0], [1.0, NAN, 4.0], [NAN, 3.0, INF], [NAN, NAN, NAN], [2.0, 2.0, 2.0]]
    assert leave_one_out(rewards).tolist() == [
        [1 - 4.0, 2 - 3.5, 6 - 1.5],
        [1 - 4.0, 0, 4 - 1.0],
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_group_normalisation_by_hand():
    rewards = [[1.0, 2.0, 6.0], [1.0, NAN, 4.0], [NAN, 3.0, NAN], [2.0, 2.0, 2.0]]
    assert group_normalised(rewards, by_deviation=False).tolist() == [
        [-2, -1, 3],
        [-1.5, 0, 1.5],
        [0, 0, 0],
        [0, 0, 0],
    ]
    found = group_normalised(rewards)
    np.testing.assert_allclose(found[0], np.array([-2, -1, 3]) / (np.sqrt(14 / 2) + 1e-4), rtol=1e-12)
    np.testing.assert_allclose(found[1, 2], 1.5 / (np.sqrt(4.5) + 1e-4), rtol=1e-12)
    assert found[1, 1] == 0 and not found[2:].any()


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_weighted_sums_of_later_surprises(gamma, gae_lambda):
    """Eq. 16 of the paper, term by term."""
    rewards, values = (np.where(MASK, RNG.normal(size=MASK.shape), 0) for _ in range(2))
    found, returns = generalised_advantages(rewards + JUNK, values + JUNK, MASK, gamma, gae_lambda)
    for b, k in np.ndindex(LENGTHS.shape):
        n = LENGTHS[b, k]
        after = [*values[b, k, 1:n], 0.0]
        delta = [rewards[b, k, t] + gamma * after[t] - values[b, k, t] for t in range(n)]
        for t in range(5):
            expected = sum((gamma * gae_lambda) ** (s - t) * delta[s] for s in range(t, n))
            np.testing.assert_allclose(found[b, k, t], expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(returns[b, k, t], expected + values[b, k, t], atol=1e-12)


def test_lambda_1_gives_the_rewards_to_come():
    rewards, values = (np.where(MASK, RNG.normal(size=MASK.shape), 0) for _ in range(2))
    _, returns = generalised_advantages(rewards, values, MASK, 1.0, 1.0)
    later = np.cumsum(rewards[..., ::-1], -1)[..., ::-1]
    np.testing.assert_allclose(returns[MASK], later[MASK], atol=1e-12)


def test_whitening_sees_real_tokens_alone():
    values = RNG.normal(3, 2, MASK.shape)
    found = whitened(values + JUNK, MASK)
    assert not found[~MASK].any()
    assert found[MASK].mean() == pytest.approx(0, abs=1e-12)
    assert found[MASK].std(ddof=1) == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(found[MASK] * values[MASK].std(ddof=1) + values[MASK].mean(), values[MASK])
    assert not whitened(values, MASK & (np.arange(MASK.size).reshape(MASK.shape) == 0)).any()


def test_one_advantage_stands_at_every_token():
    found = per_token([[1.0, -2.0], [3.0, 0.0], [7.0, 4.0]], MASK)
    assert found[0, 0].tolist() == [1, 1, 1, 0, 0] and found[2, 1].tolist() == [4, 4, 0, 0, 0]
    assert not found[2, 0].any()


def test_explained_variance():
    returns = RNG.normal(size=MASK.shape)
    assert explained_variance(returns + 2 + JUNK, returns, MASK) == pytest.approx(1)
    assert explained_variance(np.full(MASK.shape, 3.0), returns, MASK) == pytest.approx(0)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3)
    assert np.isnan(explained_variance(returns, np.ones(MASK.shape), MASK))
    assert np.isnan(explained_variance(returns, returns, np.zeros(MASK.shape)))
