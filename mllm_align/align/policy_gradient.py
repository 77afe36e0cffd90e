"""Policy gradients on rollouts: RLOO, GRPO and PPO.

A rollout has K responses to each prompt, sampled from the policy, and a reward for each. `credit` turns
rewards into the fields that the objective's batches hold, on the host and for the whole rollout at once.
The loss then sees arrays alone, for as many updates as are taken on it.

Notation, per token: lp is the policy's log-probability, old that of the policy that sampled, by the same
forward pass, lr the reference's, all in nats; the ratio rho = exp(lp - old); A the advantage; eps = `clip`.
Estimates of the divergence of policy from reference: k1 = lp - lr, k2 = k1^2 / 2,
k3 = exp(-k1) + k1 - 1. The clipped surrogate is -min(rho A, clip(rho, 1 - eps, 1 + eps) A).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mllm_align.align import advantages as host
from mllm_align.align.checks import check_count, check_flag, check_setting
from mllm_align.align.contract import OBJECTIVES, Metrics, Objective, Scalar, Signals, Terms
from mllm_align.batch import Responses
from mllm_align.errors import InputError, quoted

LARGEST = 40.0  # nats; above, the squared gradient of an exponential would overflow float32
NORMALISATIONS = ("sequence", "token", "constant")


class Tokens(NamedTuple):
    """Of each token of a batch [B, K, R]; 0, or False, at padding."""

    mask: Bool[Array, "B K R"]
    weight: Float[Array, "B K R"]
    change: Float[Array, "B K R"]
    """lp - old"""
    advantages: Float[Array, "B K R"]
    k1: Float[Array, "B K R"]

    @property
    def responses(self) -> Float[Array, "B K"]:
        """The group's weight, at responses that have a token."""
        return self.weight[:, :, 0]


class Clipped(NamedTuple):
    """The clipped surrogate, its ratio, and whether the clipping takes its gradient away."""

    loss: Float[Array, "..."]
    ratio: Float[Array, "..."]
    bound: Bool[Array, "..."]


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """What the three have in common; a subclass says what a batch loses, and how rewards are credited."""

    needs = frozenset({"reference", "rollout"})
    responses: int = 4  # type: ignore[misc]
    beta: float = 0.05
    clip: float = 0.2

    def __post_init__(self):
        check_count("responses", self.responses, 1, 1024)
        check_setting("beta", self.beta, 0)
        check_setting("clip", self.clip, 0)

    def credit(
        self, rewards: Any, mask: Any, old: Any, reference: Any, values: Any = None
    ) -> dict[str, np.ndarray]:
        """The rest of `fields`, [B, K, R] float64, of a whole rollout.

        rewards [B, K], NaN where a response could not be scored; the others [B, K, R], as in
        `align/advantages.py`. values: of an objective that needs them.
        """
        raise NotImplementedError

    def losses(self, tokens: Tokens, signals: Signals) -> tuple[dict[str, Scalar], Metrics]:
        """The sum of every term, and the metrics of its own."""
        raise NotImplementedError

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        tokens = self._tokens(signals)
        sums, metrics = self.losses(tokens, signals)
        weight, k1 = tokens.weight, tokens.k1
        each = {
            "policy/nll": jnp.where(tokens.mask, -signals.policy[0], 0.0),
            "kl/k1": k1,
            "kl/k2": jnp.square(k1) / 2,
            "kl/k3": k3(k1),
        }
        metrics |= {name: mean(value, weight) for name, value in each.items()}
        metrics["kl/sequence"] = mean(k1.sum(-1), tokens.responses)
        return Terms(sums, jax.lax.stop_gradient(metrics))

    def _tokens(self, signals: Signals) -> Tokens:
        given: Any = signals.responses
        absent = [name for name in self.fields if getattr(given, name) is None]
        if signals.reference is None:
            absent.append("reference")
        if absent:
            name = type(self).__name__
            raise ValueError(f"{name} learns from rollouts; the batch has no {', '.join(absent)}")
        (policy,), (reference,) = signals.policy, signals.reference  # type: ignore[misc]
        mask = signals.mask()

        def real(x: Any) -> Any:
            return jnp.where(mask, x, 0.0)

        weight, change, k1 = token_weights(given), real(policy - given.old), real(policy - reference)
        return Tokens(mask, weight, change, real(given.advantages), k1)


def clipped(change: Array, advantages: Array, clip: float) -> Clipped:
    """Of tokens, or of whole responses. change: the logarithm of the ratio."""
    ratio = jnp.exp(jnp.minimum(change, LARGEST))
    free, held = ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    return Clipped(-jnp.minimum(free, held), ratio, free > held)


def k3(k1: Array) -> Array:
    return jnp.exp(jnp.minimum(-k1, LARGEST)) + k1 - 1


def mean(values: Array, weight: Array) -> tuple[Scalar, Scalar]:
    """(sum, weight) of a metric."""
    return (values * weight).sum(), weight.sum()


def surrogate_metrics(made: Clipped, weight: Array) -> Metrics:
    return {
        "policy/ratio": mean(made.ratio, weight),
        "policy/clipped": mean(made.bound.astype(jnp.float32), weight),
    }


def response_weights(responses: Responses) -> Float[Array, "B K"]:
    """The group's weight, at responses that have a token."""
    return jnp.where(responses.mask.any(-1), responses.weight[:, None], 0.0)


def token_weights(responses: Responses) -> Float[Array, "B K R"]:
    return jnp.where(responses.mask, responses.weight[:, None, None], 0.0)


@OBJECTIVES.register("rloo")
@dataclass(frozen=True)
class RLOO(PolicyGradient):
    """The clipped surrogate of whole responses, the mean over responses (Ahmadian et al. 2024).

    rho = exp(sum of lp - old over the response). A = R - the mean R of the prompt's other responses, with
    R = reward - beta (sum of k1 under the policy that sampled). As TRL's RLOOTrainer.
    """

    def __post_init__(self):
        super().__post_init__()
        check_count("responses", self.responses, 2, 1024)

    def credit(self, rewards, mask, old, reference, values=None):
        penalised = host.sequence_penalty(rewards, mask, old, reference, self.beta)
        return {"advantages": host.per_token(host.leave_one_out(penalised), mask)}

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {"policy": response_weights(responses).sum()}

    def losses(self, tokens, signals):
        made = clipped(tokens.change.sum(-1), tokens.advantages[:, :, 0], self.clip)
        total = (made.loss * tokens.responses).sum()
        return {"policy": total}, surrogate_metrics(made, tokens.responses)


@OBJECTIVES.register("grpo")
@dataclass(frozen=True)
class GRPO(PolicyGradient):
    """The clipped surrogate of tokens + beta k3 (Shao et al. 2024, eqs. 3 and 4).

    A = (reward - mean) / (deviation + 1e-4) over the prompt's responses; without `by_deviation` it is not
    divided (Liu et al. 2025). normalisation: "sequence" is the mean over responses of their means over
    tokens (GRPO), "token" the mean over all tokens (DAPO; Yu et al. 2025), "constant" the sum over tokens
    by `length` times the number of responses (Dr. GRPO; Liu et al. 2025). As TRL's GRPOTrainer.

    corrected_kl: beta rho k3 instead. Its gradient is an unbiased one of KL(policy || reference); that of
    k3 alone is one of KL(reference || policy) on fresh samples, so that the policy does not become the
    reference times exp(reward / beta) (DeepSeek-V3.2; TRL's `use_bias_correction_kl`).
    """

    beta: float = 0.04
    normalisation: str = "sequence"
    length: int = 256
    by_deviation: bool = True
    corrected_kl: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_count("responses", self.responses, 2, 1024)
        check_count("length", self.length, 1, 65536)
        if self.normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            wrong = quoted(self.normalisation)
            raise InputError(f"objective.normalisation is {wrong}; it must be one of {known}")
        for name in ("by_deviation", "corrected_kl"):
            check_flag(name, getattr(self, name))

    def credit(self, rewards, mask, old, reference, values=None):
        return {"advantages": host.per_token(host.group_normalised(rewards, self.by_deviation), mask)}

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        if self.normalisation == "token":
            return {"policy": token_weights(responses).sum()}
        count = response_weights(responses).sum()
        return {"policy": count * self.length if self.normalisation == "constant" else count}

    def losses(self, tokens, signals):
        made = clipped(tokens.change, tokens.advantages, self.clip)
        divergence = k3(tokens.k1) * (made.ratio if self.corrected_kl else 1.0)
        each = (made.loss + self.beta * divergence) * tokens.weight
        if self.normalisation == "sequence":
            each = each / jnp.maximum(tokens.mask.sum(-1, keepdims=True), 1).astype(each.dtype)
        return {"policy": each.sum()}, surrogate_metrics(made, tokens.weight)


@OBJECTIVES.register("ppo")
@dataclass(frozen=True)
class PPO(PolicyGradient):
    """The clipped surrogate of tokens + value_weight times the clipped loss of values, means over tokens
    (Schulman et al. 2017, eqs. 7 and 9, without the entropy).

    Token rewards are -beta k1 under the policy that sampled, and the response's reward at its last token; A
    is that of GAE (gamma, gae_lambda) on the values of before, whitened over the rollout's tokens. The loss
    of values is max((v - return)^2, (clip(v, V +- value_clip) - return)^2) / 2, V the value of before. As
    TRL's PPOTrainer, which puts the reward one place later where padding follows.
    """

    needs = frozenset({"reference", "rollout", "values"})
    responses: int = 1  # type: ignore[misc]
    value_clip: float = 0.2
    value_weight: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        check_setting("value_clip", self.value_clip, 0)
        check_setting("value_weight", self.value_weight, 0)
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            check_setting(name, value, 0)
            if value > 1:
                raise InputError(f"objective.{name} is {value:g}; it must be from 0 to 1")

    def credit(self, rewards, mask, old, reference, values=None):
        if values is None:
            raise ValueError("PPO credits tokens by values; none were given")
        mask = np.asarray(mask, bool)
        scored = mask & np.isfinite(rewards)[..., None]
        each = host.token_rewards(rewards, scored, old, reference, self.beta)
        advantages, returns = host.generalised_advantages(each, values, scored, self.gamma, self.gae_lambda)
        kept = np.where(mask, values, 0.0)  # of what has no reward: nothing is asked of it
        return {
            "advantages": host.whitened(advantages, scored),
            "returns": np.where(scored, returns, kept),
        }

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        count = token_weights(responses).sum()
        return {"policy": count, "value": count}

    def losses(self, tokens, signals):
        made = clipped(tokens.change, tokens.advantages, self.clip)
        given: Any = signals.responses
        old, returns = given.values, given.returns
        values: Any = jnp.where(tokens.mask, signals.values, 0.0)  # type: ignore[arg-type]
        held = jnp.clip(values, old - self.value_clip, old + self.value_clip)
        free, bound = jnp.square(values - returns), jnp.square(held - returns)
        value = jnp.maximum(free, bound) / 2
        sums = {
            "policy": (made.loss * tokens.weight).sum(),
            "value": self.value_weight * (value * tokens.weight).sum(),
        }
        return sums, surrogate_metrics(made, tokens.weight) | {
            "value/error": mean(free, tokens.weight),
            "value/clipped": mean((bound > free).astype(jnp.float32), tokens.weight),
        }
