"""Idefics3's projector of one linear map, and which towers its position ids allow."""

from __future__ import annotations

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float

from mllm_align.models.layers import Linear


class Projector(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
        return Linear(self.hidden, ("mlp", "embed"), name="linear")(x)


def exact_places(side: int) -> bool:
    """Whether the reference puts every line of a tile of `side` lines into a place of its own.

    It compares fractions line / side with bounds at multiples of 1 / side, both in float32. For some sides
    (25, 31; none that is published) a fraction falls short of its bound, and two lines share a place. Which
    ones is a matter of the machine, whose vectors of bounds are rounded once for each `lanes`.
    """
    single, step, numbers = np.float32, 1 / side, np.arange(side - 1)
    lines = np.minimum(np.arange(side, dtype=single) * (single(1) / single(side)), single(1 - 1e-6))
    for lanes in (1, 4, 8, 16):
        starts = (step + numbers // lanes * lanes * step).astype(single)
        bounds = (starts.astype(np.float64) + numbers % lanes * step).astype(single)
        if (np.searchsorted(bounds, lines, side="right") != np.arange(side)).any():
            return False
    return True
