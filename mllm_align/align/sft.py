"""Supervised fine-tuning on the chosen response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from mllm_align.align.contract import OBJECTIVES, Objective, Scalar, Signals, Terms
from mllm_align.batch import Responses


@OBJECTIVES.register("sft")
@dataclass(frozen=True)
class SFT(Objective):
    """Negative log-likelihood of the chosen response, per token (nats)."""

    responses = 1

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        tokens = responses.mask[:, 0].sum(-1).astype(jnp.float32)
        return {"nll": (tokens * responses.weight).sum()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        each = signals.policy[0][:, 0].sum(-1) * signals.weight
        return Terms({"nll": -each.sum()}, {"logps/chosen": (each.sum(), signals.weight.sum())})


class WithSFT(Objective):
    """Mixed into an objective on groups whose first response is the chosen one: adds `sft_weight` times
    `SFT`'s loss, nats per token."""

    sft_weight: float

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return super().weights(responses) | (SFT().weights(responses) if self.sft_weight else {})

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        terms = super().__call__(signals, state)
        if not self.sft_weight:
            return terms
        nll = SFT()(signals).sums["nll"]
        return terms._replace(sums=terms.sums | {"nll": self.sft_weight * nll})
