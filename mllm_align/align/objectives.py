"""Objectives on offline responses: per-token log-probabilities in, (sum, weight, metrics) out.

Notation, per group: chosen y+ = response 0, rejected y- = response 1; logp(y) is the sum over a
response's tokens, end of sequence included, in nats; the log-ratio of y is logp_policy - logp_reference;
h = log-ratio(y+) - log-ratio(y-). The implicit reward of y is beta times its log-ratio.

Each objective is a frozen dataclass of its settings with one pure function. The loss of a batch is
sum / weight, so sums and weights of micro-batches, devices and hosts add up to those of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mllm_align.errors import InputError, quoted

Scalar = Float[Array, ""]
Metrics = dict[str, tuple[Scalar, Scalar]]
"""Name -> (sum, weight); divided once, when logged."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogProbs:
    """What an objective may look at. Nats per token; 0 at padding.

    reference is None for objectives that compare with no reference.
    """

    policy: Float[Array, "B K R"]
    reference: Float[Array, "B K R"] | None
    mask: Bool[Array, "B K R"]
    weight: Float[Array, " B"]


@dataclass(frozen=True)
class SFT:
    """Negative log-likelihood of the chosen response, per token (nats); weight = tokens."""

    responses: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False

    def __call__(self, logps: LogProbs) -> tuple[Scalar, Scalar, Metrics]:
        each = logps.policy[:, 0].sum(-1) * logps.weight
        tokens = (logps.mask[:, 0].sum(-1).astype(jnp.float32) * logps.weight).sum()
        groups = logps.weight.sum()
        return -each.sum(), tokens, {"logps/chosen": (each.sum(), groups)}


class _Pairwise:
    """Shared by objectives on (chosen, rejected): log-ratios, implicit rewards and their metrics."""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    beta: float

    def loss(self, h: Float[Array, " B"]) -> Float[Array, " B"]:
        raise NotImplementedError

    def difference(self, logps: LogProbs, ratios: Float[Array, "B K"]) -> Float[Array, " B"]:
        return ratios[:, 0] - ratios[:, 1]

    def __call__(self, logps: LogProbs) -> tuple[Scalar, Scalar, Metrics]:
        if logps.reference is None:
            raise ValueError(f"{type(self).__name__} compares with a reference; none was given")
        policy = logps.policy.sum(-1)
        ratios = policy - logps.reference.sum(-1)
        rewards = self.beta * jax.lax.stop_gradient(ratios)
        margin = rewards[:, 0] - rewards[:, 1]
        weight, total = logps.weight, logps.weight.sum()
        each = {
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margin": margin,
            "rewards/accuracy": (margin > 0).astype(jnp.float32),
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
        }
        metrics = {name: ((value * weight).sum(), total) for name, value in each.items()}
        return (self.loss(self.difference(logps, ratios)) * weight).sum(), total, metrics


LARGE = 1e6  # no beta is meant to be larger


def _check(name: str, value: float, low: float, high: float = LARGE) -> None:
    """Refuse what is no number, or not in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"objective.{name} is {quoted(value)}; it must be a number")
    if not low <= value < high:
        limit = f"at least {low:g} and below {high:g}"
        shown = f"{value:g}" if isinstance(value, float) or abs(value) < 1e300 else "far too large"
        raise InputError(f"objective.{name} is {shown}; it must be {limit}")


@dataclass(frozen=True)
class DPO(_Pairwise):
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing.

    e = 0 is DPO (Rafailov et al. 2023, eq. 7); e > 0 is conservative DPO (cDPO), for labels that are
    wrong with probability e. TRL's `label_smoothing` does not act in its sigmoid loss.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self):
        _check("beta", self.beta, 0)
        _check("label_smoothing", self.label_smoothing, 0, 0.5)

    def loss(self, h):
        e = self.label_smoothing
        right, wrong = jax.nn.log_sigmoid(self.beta * h), jax.nn.log_sigmoid(-self.beta * h)
        return -(1 - e) * right - e * wrong


@dataclass(frozen=True)
class RobustDPO(_Pairwise):
    """[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e), e = label_smoothing.

    Unbiased under labels that are flipped with probability e (Chowdhury et al. 2024, eq. 12).
    """

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self):
        _check("beta", self.beta, 0)
        _check("label_smoothing", self.label_smoothing, 0, 0.5)

    def loss(self, h):
        e = self.label_smoothing
        right, wrong = jax.nn.log_sigmoid(self.beta * h), jax.nn.log_sigmoid(-self.beta * h)
        return (-(1 - e) * right + e * wrong) / (1 - 2 * e)


@dataclass(frozen=True)
class IPO(_Pairwise):
    """(hbar - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17).

    hbar divides each response's log-ratio by its number of tokens, as TRL's DPOTrainer does with the
    paper's authors' word for it; `length_normalised=False` takes the sums, as others do.
    """

    beta: float = 0.1
    length_normalised: bool = True

    def __post_init__(self):
        _check("beta", self.beta, 1e-6)
        if not isinstance(self.length_normalised, bool):
            raise InputError("objective.length_normalised is no bool; it must be True or False")

    def difference(self, logps, ratios):
        if self.length_normalised:
            tokens = jnp.maximum(logps.mask.sum(-1), 1).astype(ratios.dtype)
            ratios = ratios / tokens
        return ratios[:, 0] - ratios[:, 1]

    def loss(self, h):
        return jnp.square(h - 1 / (2 * self.beta))


@dataclass(frozen=True)
class SLiC(_Pairwise):
    """max(0, 1 - beta h): the reference-relative hinge, not SLiC-HF's reference-free rank loss."""

    beta: float = 0.1

    def __post_init__(self):
        _check("beta", self.beta, 0)

    def loss(self, h):
        return jax.nn.relu(1 - self.beta * h)


@dataclass(frozen=True)
class Averaged:
    """gamma L(y+, y-) + (1 - gamma) L(y+, y~-) of groups (y+, y-, y~-) (arXiv 2407.02477, Eq. 5).

    y- comes with the data, y~- from the policy. L is a pairwise objective; its metrics are those of
    (y+, y-), and under policy/ those of (y+, y~-). A group without y~- has an empty one and counts with
    L(y+, y-) alone.
    """

    responses: ClassVar[int] = 3
    needs_reference: ClassVar[bool] = True
    pair: DPO | RobustDPO | IPO | SLiC = DPO()
    gamma: float = 0.5

    def __post_init__(self):
        _check("gamma", self.gamma, 0)
        if self.gamma > 1:
            raise InputError(f"objective.gamma is {self.gamma:g}; it must be from 0 to 1")
        if not isinstance(self.pair, _Pairwise):
            raise InputError(f"objective.pair is {quoted(self.pair)}; it must be one on pairs")

    def __call__(self, logps: LogProbs) -> tuple[Scalar, Scalar, Metrics]:
        made = logps.mask[:, 2].any(-1).astype(logps.weight.dtype)
        share = self.gamma * made + (1 - made)
        data, _, metrics = self.pair(_pair(logps, 1, logps.weight * share))
        own, _, others = self.pair(_pair(logps, 2, logps.weight * (1 - share)))
        metrics |= {f"policy/{name}": value for name, value in others.items()}
        return data + own, logps.weight.sum(), metrics


def _pair(logps: LogProbs, rejected: int, weight: Float[Array, " B"]) -> LogProbs:
    """The group with its first response and another one."""
    if logps.reference is None:
        raise ValueError("pairs are compared with a reference; none was given")
    which = jnp.array([0, rejected])
    return LogProbs(logps.policy[:, which], logps.reference[:, which], logps.mask[:, which], weight)


Objective = DPO | RobustDPO | IPO | SLiC | Averaged | SFT
