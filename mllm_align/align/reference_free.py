"""Objectives on (chosen, rejected) pairs by the policy alone: no reference is computed.

Notation as in `pairwise.py`; m(y) = logp(y) / |y|, the mean over a response's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mllm_align.align.checks import check_setting
from mllm_align.align.contract import OBJECTIVES, Objective, Scalar, Signals, Terms
from mllm_align.align.pairwise import figures, per_token
from mllm_align.align.sft import WithSFT
from mllm_align.batch import Responses


@dataclass(frozen=True)
class ReferenceFree(Objective):
    """Scores and their metrics; a subclass has `beta` and says what a pair loses. The logged rewards are
    beta times the scores."""

    responses = 2
    beta: float = 0.1

    def __post_init__(self):
        check_setting("beta", self.beta, 0)

    def scores(self, policy: Float[Array, "B 2"], mask: Bool[Array, "B 2 R"]) -> Float[Array, "B 2"]:
        """By which responses are compared. policy: log-probabilities, nats per sequence."""
        return per_token(policy, mask)

    def loss(self, chosen: Float[Array, " B"], rejected: Float[Array, " B"]) -> Float[Array, " B"]:
        """Of each pair, by its scores."""
        raise NotImplementedError

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {"pairs": responses.weight.sum()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        policy = signals.policy[0].sum(-1)
        scores = self.scores(policy, signals.mask())
        losses = self.loss(scores[:, 0], scores[:, 1])
        metrics = figures(self.beta * scores, policy, signals.weight)
        return Terms({"pairs": (losses * signals.weight).sum()}, metrics)


@OBJECTIVES.register("simpo")
@dataclass(frozen=True)
class SimPO(ReferenceFree):
    """-log sigmoid(beta (m(y+) - m(y-)) - gamma) (Meng et al. 2024, arXiv 2405.14734, eq. 6)."""

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_setting("gamma", self.gamma, 0)

    def loss(self, chosen, rejected):
        return -jax.nn.log_sigmoid(self.beta * (chosen - rejected) - self.gamma)


@OBJECTIVES.register("cpo")
@dataclass(frozen=True)
class CPO(WithSFT, ReferenceFree):
    """-log sigmoid(beta (logp(y+) - logp(y-))) + sft_weight times `SFT`'s loss, nats per token of y+.

    Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417, eq. 3 and the NLL beside it):
    DPO with a uniform reference. sft_weight is TRL's `cpo_alpha`.
    """

    sft_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_setting("sft_weight", self.sft_weight, 0)

    def scores(self, policy, mask):
        return policy

    def loss(self, chosen, rejected):
        return -jax.nn.log_sigmoid(self.beta * (chosen - rejected))


@OBJECTIVES.register("orpo")
@dataclass(frozen=True)
class ORPO(WithSFT, ReferenceFree):
    """`SFT`'s loss, nats per token of y+, - beta log sigmoid(log(odds(y+) / odds(y-))).

    Odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, eqs. 4, 6 and 7; its lambda is
    beta here as in TRL): odds(y) = p / (1 - p), p = exp(m(y)). TRL's ORPOTrainer takes the first loss over
    the prompt's tokens too.
    """

    sft_weight: ClassVar[float] = 1.0

    def loss(self, chosen, rejected):
        return -self.beta * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(score: Float[Array, " B"]) -> Float[Array, " B"]:
    """log(p / (1 - p)) of p = exp(score); p stays below 1, where an odds would be infinite."""
    score = jnp.minimum(score, -1e-6)
    return score - jnp.log(-jnp.expm1(score))
