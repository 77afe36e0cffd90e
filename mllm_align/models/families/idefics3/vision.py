"""SigLIP's vision transformer, the pixel shuffle, and Idefics3's projector of one linear map."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int

from mllm_align.models.families.vit import Block, VitConfig
from mllm_align.models.layers import LayerNorm, Linear, parameter, scanned
from mllm_align.sharding import constrain


@dataclass(frozen=True)
class SiglipConfig(VitConfig):
    """shuffle: side, in patches, of the cells that become one embedding each."""

    activation: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-6
    shuffle: int = 1

    @property
    def tokens(self) -> int:
        return (self.side // self.shuffle) ** 2

    @property
    def features(self) -> int:
        return self.hidden * self.shuffle**2


class SiglipTower(nn.Module):
    config: SiglipConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "n N C"], place: Int[Array, "n N 2"]) -> Float[Array, "n I F"]:
        """Normalized hidden states, a cell of patches side by side in each feature.

        A tile is whole: its patches have the places of the table, line by line (see `exact_places`).
        """
        c = self.config
        x = Linear(c.hidden, ("patch", "embed"), bias=True, name="patch_embedding")(patches)
        normal, shape = nn.initializers.normal(0.02), (c.places, c.hidden)
        positions = parameter(self, "position_embedding", normal, (None, "embed"), shape)
        x = constrain(x + positions[None], "rows", None, None)
        x, _ = scanned(Block, c.layers, self.remat)(c, name="layers")(x)
        return shuffled(LayerNorm(c.norm_eps, name="post_norm")(x), c.side, c.shuffle)


def shuffled(x: Float[Array, "n N D"], side: int, cell: int) -> Float[Array, "n I F"]:
    """Pixel shuffle: the cell x cell patches of a cell as one feature, cells and patches line by line."""
    count, _, width = x.shape
    down = side // cell
    x = x.reshape(count, down, cell, down, cell, width).swapaxes(2, 3)
    return x.reshape(count, down * down, cell * cell * width)


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
