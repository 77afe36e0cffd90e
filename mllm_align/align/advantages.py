"""From the rewards of a rollout to the advantages of its tokens: plain numpy, float64.

B prompts, K responses to each, R tokens. rewards [B, K]: one a response, NaN or infinite where it could not
be scored; such a response gets the advantage 0 and enters no baseline, mean or deviation. mask [B, K, R]:
real tokens, which stand at the start of their row. old, reference [B, K, R]: nats per token under the
policy that sampled the responses and under the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray
GROUP_EPSILON = 1e-4  # added to a group's deviation, as in TRL's GRPOTrainer
WHITENING_EPSILON = 1e-8  # added to a variance, as in TRL's PPOTrainer


def scaled(rewards: Any, mean: float, deviation: float) -> Array:
    """(rewards - mean) / deviation; both were measured before the run. deviation above 0."""
    return (_wide(rewards) - mean) / deviation


def without_end(rewards: Any, ended: Any, penalty: float) -> Array:
    """The rewards, less by `penalty` for responses that have no end of sequence. ended [B, K] bool."""
    return _wide(rewards) - penalty * ~np.asarray(ended, bool)


def sequence_penalty(rewards: Any, mask: Any, old: Any, reference: Any, beta: float) -> Array:
    """[B, K]: reward - beta * (sum of k1 over the response's tokens), k1 = old - reference."""
    return _wide(rewards) - beta * _k1(mask, old, reference).sum(-1)


def token_rewards(rewards: Any, mask: Any, old: Any, reference: Any, beta: float) -> Array:
    """[B, K, R]: -beta k1 at every token, and the reward at the last one."""
    mask = np.asarray(mask, bool)
    last = mask & (np.arange(mask.shape[-1]) == mask.sum(-1, keepdims=True) - 1)
    ends = np.where(last, _wide(rewards)[..., None], 0.0)
    return ends - beta * _k1(mask, old, reference)


def leave_one_out(rewards: Any) -> Array:
    """[B, K]: each reward less the mean of the others of its prompt (RLOO; Ahmadian et al. 2024)."""
    rewards = _scores(rewards)
    others = np.isfinite(rewards).sum(-1, keepdims=True) - 1
    total = np.nansum(rewards, axis=-1, keepdims=True)
    baseline = (total - rewards) / np.maximum(others, 1)
    return np.where((others > 0) & np.isfinite(rewards), rewards - baseline, 0.0)


def group_normalised(rewards: Any, by_deviation: bool = True) -> Array:
    """[B, K]: each reward less the mean of its prompt's, divided by their deviation + 1e-4 (GRPO; Shao et
    al. 2024). The deviation of n rewards divides by n - 1."""
    rewards = _scores(rewards)
    count = np.isfinite(rewards).sum(-1, keepdims=True)
    centred = rewards - np.nansum(rewards, axis=-1, keepdims=True) / np.maximum(count, 1)
    if by_deviation:
        variance = np.nansum(centred**2, axis=-1, keepdims=True) / np.maximum(count - 1, 1)
        centred = centred / (np.sqrt(variance) + GROUP_EPSILON)
    return np.where((count > 1) & np.isfinite(rewards), centred, 0.0)


def generalised_advantages(
    rewards: Any, values: Any, mask: Any, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """(advantages, returns) [B, K, R] of token rewards (GAE; Schulman et al. 2016, eqs. 11 to 16).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lambda A_{t+1}; return = A + V. V and A are 0
    after the last token. values [B, K, R]: V_t is of the state that predicts token t.
    """
    mask = np.asarray(mask, bool)
    rewards, values = (np.where(mask, _wide(x), 0.0) for x in (rewards, values))
    advantages = np.zeros_like(values)
    next_value, later = np.zeros(mask.shape[:-1]), np.zeros(mask.shape[:-1])
    for t in reversed(range(mask.shape[-1])):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        later = np.where(mask[..., t], delta + gamma * gae_lambda * later, 0.0)
        next_value, advantages[..., t] = values[..., t], later
    return advantages, advantages + values


def whitened(advantages: Any, mask: Any) -> Array:
    """(A - mean) / sqrt(variance + 1e-8) over tokens of the mask, the variance with n - 1; 0 elsewhere."""
    mask, advantages = np.asarray(mask, bool), _wide(advantages)
    real = advantages[mask]
    if len(real) < 2:
        return np.zeros_like(advantages)
    centred = advantages - real.mean()
    return np.where(mask, centred / np.sqrt(real.var(ddof=1) + WHITENING_EPSILON), 0.0)


def per_token(advantages: Any, mask: Any) -> Array:
    """[B, K] -> [B, K, R]: the same at each token of a response, 0 at padding."""
    return np.where(np.asarray(mask, bool), _wide(advantages)[..., None], 0.0)


def explained_variance(values: Any, returns: Any, mask: Any) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 for a perfect value model, 0 for a
    constant; NaN where the returns do not vary."""
    mask = np.asarray(mask, bool)
    values, returns = _wide(values)[mask], _wide(returns)[mask]
    variance = returns.var() if len(returns) else 0.0
    return float(1 - (returns - values).var() / variance) if variance > 0 else float("nan")


def _wide(x: Any) -> Array:
    return np.asarray(x, np.float64)


def _scores(rewards: Any) -> Array:
    """NaN wherever there is no finite number."""
    rewards = _wide(rewards)
    return np.where(np.isfinite(rewards), rewards, np.nan)


def _k1(mask: Any, old: Any, reference: Any) -> Array:
    return np.where(np.asarray(mask, bool), _wide(old) - _wide(reference), 0.0)
