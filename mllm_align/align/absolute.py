"""Objectives that judge each response by its own log-ratio, not only by the difference of two.

Notation as in `pairwise.py`; u is a response's log-ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_align.align.checks import check_setting
from mllm_align.align.contract import OBJECTIVES, Objective, Scalar, Signals, Terms
from mllm_align.align.pairwise import Pairwise
from mllm_align.batch import Responses
from mllm_align.errors import InputError, quoted


@OBJECTIVES.register("bco")
@dataclass(frozen=True)
class BCO(Pairwise):
    """-log sigmoid(beta u+ - delta) - log sigmoid(-(beta u- - delta)): is a response chosen or rejected?

    Binary classifier optimization (Jung et al. 2024, arXiv 2404.04656, section 4) on pairs. delta is the
    mean of all rewards, chosen and rejected, of the steps before, 0 in the first: it moves neither loss nor
    gradient with the way in which a batch is cut. TRL's BCOTrainer takes the batch at hand into it; TRL's
    `bco_pair` has no delta.
    """

    def losses(self, ratios, mask, state):
        rewards = self.beta * ratios - state["mean"]
        return -jax.nn.log_sigmoid(rewards[:, 0]) - jax.nn.log_sigmoid(-rewards[:, 1])

    def init_state(self) -> Any:
        return {"mean": jnp.zeros(()), "count": jnp.zeros(())}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        terms = super().__call__(signals, state)
        (chosen, pairs), (rejected, _) = (terms.metrics[f"rewards/{y}"] for y in ("chosen", "rejected"))
        metrics = terms.metrics | {"rewards/delta": (state["mean"], jnp.ones(()))}
        return terms._replace(metrics=metrics, stats={"sum": chosen + rejected, "count": 2 * pairs})

    def update(self, state: Any, stats: Any) -> Any:
        count = state["count"] + stats["count"]
        gained = (stats["sum"] - state["mean"] * stats["count"]) / jnp.maximum(count, 1)
        return {"mean": state["mean"] + gained, "count": count}


@OBJECTIVES.register("apo")
@dataclass(frozen=True)
class APO(Pairwise):
    """zero: 1 - sigmoid(beta u+) + sigmoid(beta u-); down: sigmoid(beta u+) + 1 - sigmoid(beta h).

    Anchored preference optimization (D'Oosterlinck et al. 2024, arXiv 2408.06266, eqs. 7 and 8; TRL's
    `apo_zero` and `apo_down`). zero raises chosen and lowers rejected responses: for chosen ones that are
    better than what the policy says. down lowers both, rejected ones more: for chosen ones that are worse.
    """

    form: Literal["zero", "down"] = "zero"

    def __post_init__(self):
        super().__post_init__()
        if self.form not in ("zero", "down"):
            raise InputError(f"objective.form is {quoted(self.form)}; it must be one of zero, down")

    def losses(self, ratios, mask, state):
        chosen, rejected = self.beta * ratios[:, 0], self.beta * ratios[:, 1]
        if self.form == "zero":
            return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)
        return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


@OBJECTIVES.register("kto")
@dataclass(frozen=True)
class KTO(Objective):
    """desirable_weight (1 - sigmoid(beta (u - z))) of a chosen response, undesirable_weight
    (1 - sigmoid(beta (z - u))) of a rejected one; the mean over all responses, pairs or not.

    Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7). z estimates how
    far the policy is from the reference, without a gradient: the mean log-ratio, at least 0, of responses
    to another prompt. Those stand at the end of each group: the chosen and the rejected one of the batch's
    next record. z is that of the batch before, 0 in the first step, so that a loss does not depend on how
    a batch is cut; TRL's KTOTrainer takes that of its micro-batch at hand.

    A group may lack its chosen or its rejected response: then that one is empty.
    """

    responses = 4
    borrowed = 2
    unpaired = True
    needs = frozenset({"reference"})
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self):
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            check_setting(name, getattr(self, name), 0)

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {"responses": _weight(responses)[:, :2].sum()}

    def init_state(self) -> Any:
        return {"z": jnp.zeros(())}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        if signals.reference is None:
            raise ValueError("KTO compares with a reference; none was given")
        policy, weight = signals.policy[0].sum(-1), _weight(signals.responses)
        ratios = policy - signals.reference[0].sum(-1)
        rise = self.beta * (ratios[:, :2] - state["z"])
        chosen = self.desirable_weight * jax.nn.sigmoid(-rise[:, 0])
        losses = jnp.stack([chosen, self.undesirable_weight * jax.nn.sigmoid(rise[:, 1])], -1)
        stopped = jax.lax.stop_gradient(ratios)
        rewards, own, other = self.beta * stopped[:, :2], weight[:, :2], weight[:, 2:]
        margin, pairs = rewards[:, 0] - rewards[:, 1], own.min(-1)
        metrics = {
            "rewards/chosen": (rewards[:, 0], own[:, 0]),
            "rewards/rejected": (rewards[:, 1], own[:, 1]),
            "rewards/margin": (margin, pairs),
            "rewards/accuracy": ((margin > 0).astype(jnp.float32), pairs),
            "logps/chosen": (policy[:, 0], own[:, 0]),
            "logps/rejected": (policy[:, 1], own[:, 1]),
            "kl/mismatched": (stopped[:, 2:], other),
        }
        metrics = {name: ((value * each).sum(), each.sum()) for name, (value, each) in metrics.items()}
        stats = dict(zip(("sum", "count"), metrics["kl/mismatched"], strict=True))
        return Terms({"responses": (losses * own).sum()}, metrics, stats)

    def update(self, state: Any, stats: Any) -> Any:
        z = jnp.maximum(stats["sum"] / jnp.maximum(stats["count"], 1), 0)
        return {"z": jnp.where(stats["count"] > 0, z, state["z"])}


def _weight(responses: Responses) -> Float[Array, "B K"]:
    """That of the group, at responses that are not empty."""
    return jnp.where(responses.mask.any(-1), responses.weight[:, None], 0.0)
