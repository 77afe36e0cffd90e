"""Reward models: a number for each response, learned from which of two is preferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mllm_align.align.checks import check_setting
from mllm_align.align.contract import OBJECTIVES, Objective, Scalar, Signals, Terms
from mllm_align.batch import Responses


@OBJECTIVES.register("reward")
@dataclass(frozen=True)
class Reward(Objective):
    """-log sigmoid(r(y+) - r(y-) - margin) + centring (r(y+) + r(y-))^2.

    Bradley-Terry (Ouyang et al. 2022, eq. 1), with a margin as in Llama 2 (Touvron et al. 2023, eq. 2; one
    for all pairs) and a term that keeps rewards near 0 (Eisenstein et al. 2023, section 2), as TRL's
    RewardTrainer has them. r(y): a linear head, without bias and 0 at the start, on the last hidden state
    of the response's last token.
    """

    responses = 2
    needs = frozenset({"score"})
    margin: float = 0.0
    centring: float = 0.0

    def __post_init__(self):
        check_setting("margin", self.margin, 0)
        check_setting("centring", self.centring, 0)

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {"pairs": responses.weight.sum()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        assert signals.scores is not None
        chosen, rejected = signals.scores[:, 0], signals.scores[:, 1]
        margin, weight = chosen - rejected, signals.weight
        losses = -jax.nn.log_sigmoid(margin - self.margin)
        losses = losses + self.centring * jnp.square(chosen + rejected)
        each = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": margin,
            "rewards/accuracy": (margin > 0).astype(jnp.float32),
        }
        stopped = jax.lax.stop_gradient(each)
        metrics = {name: ((value * weight).sum(), weight.sum()) for name, value in stopped.items()}
        return Terms({"pairs": (losses * weight).sum()}, metrics)
