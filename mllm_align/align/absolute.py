"""Objectives that judge each response by its own log-ratio, not only by the difference of two.

Notation as in `pairwise.py`; u is a response's log-ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mllm_align.align.contract import OBJECTIVES, Signals, Terms
from mllm_align.align.pairwise import Pairwise


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
