"""How good a reward model is: preference pairs, their rewards, and whether these follow length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mllm_align.evaluation.base import EVALUATORS, Evaluator, Item, Rewards, Scored

BINS = 10
GAPS = tuple(f"_gap{number}" for number in range(BINS))


def _calibration_error(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """A gap is right minus sure, of the pairs in its bin, over all pairs: their share is in it."""
    return sum(np.abs(means[gap]) for gap in GAPS)  # type: ignore[return-value]


def _length_correlation(means: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pearson's; 0 where rewards or lengths do not vary."""
    reward, tokens = means["_reward"], means["_tokens"]
    together = means["_reward_tokens"] - reward * tokens
    spread = (means["_reward_squared"] - reward**2) * (means["_tokens_squared"] - tokens**2)
    varies = spread > 1e-12 * means["_reward_squared"] * means["_tokens_squared"]
    return np.where(varies, together / np.sqrt(np.where(varies, spread, 1.0)), 0.0)


@EVALUATORS.register("reward")
@dataclass(frozen=True)
class PairAccuracy(Evaluator):
    """A reward model on preference pairs, in any format that `train` reads.

    accuracy: share of the pairs whose chosen response has the higher reward; equal ones count half.
    margin: r(y+) - r(y-). calibration_error: expected calibration error (Guo et al. 2017, arXiv 1706.04599,
    eq. 3) of the probability that the model gives the response it prefers, sigmoid |margin|, in ten bins of
    equal width from 0.5 to 1. length_correlation: Pearson's, of reward and length in tokens, over all
    responses. longer_accuracy: of a rule that prefers the longer response.
    """

    references = 2
    needs = "rewards"
    derived = {"calibration_error": _calibration_error, "length_correlation": _length_correlation}
    ways = {"calibration_error": -1, "margin": 0, "length_correlation": 0, "longer_accuracy": 0}

    def score(self, item: Item, answer: Rewards) -> Scored:
        rewards, tokens = (np.asarray(each, np.float64) for each in answer)
        margin, longer = (float(each[0] - each[1]) for each in (rewards, tokens))
        right = _won(margin)
        sure = 1 / (1 + math.exp(-abs(margin)))
        own = min(int((sure - 0.5) * 2 * BINS), BINS - 1)
        moments = {
            "_reward": rewards,
            "_tokens": tokens,
            "_reward_tokens": rewards * tokens,
            "_reward_squared": rewards**2,
            "_tokens_squared": tokens**2,
        }
        return Scored(
            {
                "accuracy": right,
                "margin": margin,
                "longer_accuracy": _won(longer),
                **{gap: right - sure if number == own else 0.0 for number, gap in enumerate(GAPS)},
                **{name: (float(each.sum()), len(each)) for name, each in moments.items()},
            }
        )


def _won(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)
