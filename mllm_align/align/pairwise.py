"""Objectives on (chosen, rejected) pairs, relative to a reference.

Notation, per group: chosen y+ = response 0, rejected y- = response 1; logp(y) is the sum over a
response's tokens, end of sequence included, in nats; the log-ratio of y is logp_policy - logp_reference;
h = log-ratio(y+) - log-ratio(y-). The implicit reward of y is beta times its log-ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mllm_align.align.checks import check_flag, check_setting
from mllm_align.align.contract import OBJECTIVES, Metrics, Objective, Scalar, Signals, Terms
from mllm_align.align.sft import WithSFT
from mllm_align.batch import Responses
from mllm_align.errors import InputError, quoted


@dataclass(frozen=True)
class Pairwise(Objective):
    """Log-ratios, implicit rewards and their metrics; a subclass has `beta` and says what a pair loses, by
    its h or by its two log-ratios."""

    responses = 2
    needs = frozenset({"reference"})
    beta: float = 0.1

    def __post_init__(self):
        check_setting("beta", self.beta, 0)

    def reference(self, signals: Signals) -> Float[Array, "B K"]:
        """Log-probabilities that the policy's are compared with, nats per sequence."""
        if signals.reference is None:
            raise ValueError(f"{type(self).__name__} compares with a reference; none was given")
        return signals.reference[0].sum(-1)

    def loss(self, h: Float[Array, " B"]) -> Float[Array, " B"]:
        """Of each pair, by its h."""
        raise NotImplementedError

    def losses(
        self, ratios: Float[Array, "B K"], mask: Bool[Array, "B K R"], state: Any
    ) -> Float[Array, " B"]:
        """Of each pair. ratios: log-ratios, nats per sequence."""
        return self.loss(ratios[:, 0] - ratios[:, 1])

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {"pairs": responses.weight.sum()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        policy = signals.policy[0].sum(-1)
        ratios = policy - self.reference(signals)
        metrics = figures(self.beta * ratios, policy, signals.weight)
        losses = self.losses(ratios, signals.mask(), state)
        return Terms({"pairs": (losses * signals.weight).sum()}, metrics)


def figures(
    rewards: Float[Array, "B 2"], policy: Float[Array, "B 2"], weight: Float[Array, " B"]
) -> Metrics:
    """What is logged of pairs. policy: log-probabilities, nats per sequence."""
    margin = rewards[:, 0] - rewards[:, 1]
    each = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).astype(jnp.float32),
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    return means(each, weight)


def means(values: dict[str, Float[Array, " B"]], weight: Float[Array, " B"]) -> Metrics:
    """Figures of each pair, as metrics, without a gradient."""
    values = jax.lax.stop_gradient(values)
    return {name: ((value * weight).sum(), weight.sum()) for name, value in values.items()}


def per_token(values: Float[Array, "B K"], mask: Bool[Array, "B K R"]) -> Float[Array, "B K"]:
    """Sums over sequences, divided by the number of tokens of each."""
    return values / jnp.maximum(mask.sum(-1), 1).astype(values.dtype)


@OBJECTIVES.register("dpo")
@dataclass(frozen=True)
class DPO(WithSFT, Pairwise):
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing.

    e = 0 is DPO (Rafailov et al. 2023, eq. 7); e > 0 is conservative DPO (cDPO), for labels that are
    wrong with probability e. TRL's `label_smoothing` does not act in its sigmoid loss.

    sft_weight adds sft_weight times `SFT`'s loss, nats per token of y+, so that logp(y+) does not fall
    together with logp(y-) (RPO: Pang et al. 2024, arXiv 2404.19733, eq. 1; TRL's `rpo_alpha`).

    length_normalised divides each log-ratio by the number of its response's tokens (Lambert et al. 2024,
    arXiv 2411.15124, eq. 6; TRL's `sigmoid_norm`).
    """

    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    length_normalised: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_setting("label_smoothing", self.label_smoothing, 0, 0.5)
        check_setting("sft_weight", self.sft_weight, 0)
        check_flag("length_normalised", self.length_normalised)

    def losses(self, ratios, mask, state):
        return super().losses(per_token(ratios, mask) if self.length_normalised else ratios, mask, state)

    def loss(self, h):
        e = self.label_smoothing
        right, wrong = jax.nn.log_sigmoid(self.beta * h), jax.nn.log_sigmoid(-self.beta * h)
        return -(1 - e) * right - e * wrong


@OBJECTIVES.register("robust")
@dataclass(frozen=True)
class RobustDPO(DPO):
    """[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e), e = label_smoothing.

    Unbiased under labels that are flipped with probability e (Chowdhury et al. 2024, eq. 12).
    """

    label_smoothing: float = 0.1

    def loss(self, h):
        e = self.label_smoothing
        right, wrong = jax.nn.log_sigmoid(self.beta * h), jax.nn.log_sigmoid(-self.beta * h)
        return (-(1 - e) * right + e * wrong) / (1 - 2 * e)


@OBJECTIVES.register("ipo")
@dataclass(frozen=True)
class IPO(Pairwise):
    """(hbar - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17).

    hbar divides each response's log-ratio by its number of tokens, as TRL's DPOTrainer does with the
    paper's authors' word for it; `length_normalised=False` takes the sums, as others do.
    """

    length_normalised: bool = True

    def __post_init__(self):
        check_setting("beta", self.beta, 1e-6)
        check_flag("length_normalised", self.length_normalised)

    def losses(self, ratios, mask, state):
        return super().losses(per_token(ratios, mask) if self.length_normalised else ratios, mask, state)

    def loss(self, h):
        return jnp.square(h - 1 / (2 * self.beta))


@OBJECTIVES.register("slic")
@dataclass(frozen=True)
class SLiC(Pairwise):
    """max(0, 1 - beta h): the reference-relative hinge, not SLiC-HF's reference-free rank loss."""

    def loss(self, h):
        return jax.nn.relu(1 - self.beta * h)


@OBJECTIVES.register("averaged")
@dataclass(frozen=True)
class Averaged(Objective):
    """gamma L(y+, y-) + (1 - gamma) L(y+, y~-) of groups (y+, y-, y~-) (arXiv 2407.02477, Eq. 5).

    y- comes with the data, y~- from the policy. L is a pairwise objective; its metrics are those of
    (y+, y-), and under policy/ those of (y+, y~-). A group without y~- has an empty one and counts with
    L(y+, y-) alone.
    """

    responses = 3
    made = 1
    needs = frozenset({"reference"})
    pair: Pairwise = DPO()
    gamma: float = 0.5

    def __post_init__(self):
        check_setting("gamma", self.gamma, 0)
        if self.gamma > 1:
            raise InputError(f"objective.gamma is {self.gamma:g}; it must be from 0 to 1")
        if not isinstance(self.pair, Pairwise):
            raise InputError(f"objective.pair is {quoted(self.pair)}; it must be one on pairs")
        if type(self.pair).init_state is not Objective.init_state:
            raise InputError(f"objective.pair is {quoted(self.pair)}; it must be one without a state")
        if self.pair.needs - self.needs:
            raise InputError(f"objective.pair is {quoted(self.pair)}; it must be one with one reference")

    @property
    def held_out(self) -> Objective:
        return self.pair

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return self.pair.weights(responses)

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        weight = signals.weight
        made = signals.mask()[:, 2].any(-1).astype(weight.dtype)
        share = self.gamma * made + (1 - made)
        data = self.pair(_pair(signals, 1, weight * share))
        own = self.pair(_pair(signals, 2, weight * (1 - share)))
        metrics = data.metrics | {f"policy/{name}": value for name, value in own.metrics.items()}
        return Terms({name: value + own.sums[name] for name, value in data.sums.items()}, metrics)


def _pair(signals: Signals, rejected: int, weight: Float[Array, " B"]) -> Signals:
    """The group with its first response and another one."""
    if signals.reference is None:
        raise ValueError("pairs are compared with a reference; none was given")
    which = jnp.array([0, rejected])
    responses = replace(signals.responses.take((0, rejected)), weight=weight)
    policy, reference = (each[0][:, which] for each in (signals.policy, signals.reference))
    return Signals((policy,), (reference,), responses, ((0, 1),))


@OBJECTIVES.register("exo")
@dataclass(frozen=True)
class EXO(Pairwise):
    """q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = sigmoid(beta h), e = label_smoothing.

    The divergence KL(q || p) of the policy's preference from the labels', which are wrong with probability
    e: exact optimization for pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16; TRL's `exo_pair`).
    """

    label_smoothing: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        check_setting("label_smoothing", self.label_smoothing, 1e-9, 0.5)

    def loss(self, h):
        e, x = self.label_smoothing, self.beta * h
        right = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - math.log1p(-e))
        wrong = jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - math.log(e))
        return right + wrong
