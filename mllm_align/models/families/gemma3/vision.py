"""Gemma 3's projector: a norm and one matrix, stored as it is multiplied."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_align.models.layers import Linear, RMSNorm


class Projector(nn.Module):
    hidden: int
    norm_eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
        h = RMSNorm(self.norm_eps, offset=1.0, name="norm")(x)
        return Linear(self.hidden, ("mlp", "embed"), name="linear")(h)
