"""SigLIP's vision transformer, and the regrouping of its features: a pixel shuffle, or their average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float, Int

from mllm_align.models import names
from mllm_align.models.families import vit
from mllm_align.models.families.vit import Block, VitConfig
from mllm_align.models.layers import LayerNorm, Linear, parameter
from mllm_align.models.names import Entry
from mllm_align.models.remat import scanned
from mllm_align.sharding import constrain


@dataclass(frozen=True)
class SiglipConfig(VitConfig):
    """shuffle: side, in patches, of the cells that become one embedding each. pool: as shuffle, but of the
    patches' average. post_norm: whether the last norm is taken of the hidden states."""

    activation: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-6
    shuffle: int = 1
    pool: int = 1
    post_norm: bool = True

    @property
    def tokens(self) -> int:
        return (self.side // self.shuffle // self.pool) ** 2

    @property
    def features(self) -> int:
        return self.hidden * self.shuffle**2


class SiglipTower(nn.Module):
    config: SiglipConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "n N C"], place: Int[Array, "n N 2"]) -> Float[Array, "n I F"]:
        """Hidden states after `config.layers` blocks, a cell of patches side by side in each feature, or
        their average.

        A tile is whole: its patches have the places of the table, line by line.
        """
        c = self.config
        x = Linear(c.hidden, ("patch", "embed"), bias=True, name="patch_embedding")(patches)
        normal, shape = nn.initializers.normal(0.02), (c.places, c.hidden)
        positions = parameter(self, "position_embedding", normal, (None, "embed"), shape)
        x = constrain(x + positions[None], "rows", None, None)
        x, _ = scanned(Block, c.layers, self.remat)(c, name="layers")(x)
        if c.post_norm:
            x = LayerNorm(c.norm_eps, name="post_norm")(x)
        if c.pool > 1:
            cells = shuffled(x, c.side, c.pool)
            return cells.reshape(*cells.shape[:2], c.pool**2, c.hidden).mean(2)
        return shuffled(x, c.side, c.shuffle)


def shuffled(x: Float[Array, "n N D"], side: int, cell: int) -> Float[Array, "n I F"]:
    """Pixel shuffle: the cell x cell patches of a cell as one feature, cells and patches line by line."""
    count, _, width = x.shape
    down = side // cell
    x = x.reshape(count, down, cell, down, cell, width).swapaxes(2, 3)
    return x.reshape(count, down * down, cell * cell * width)


def tensors(config: SiglipConfig, module: str) -> Iterator[Entry]:
    """module: the tower's name in the checkpoint."""
    yield from vit.tensors(config, module, bias=True)
    if config.post_norm:
        post = f"{module}.post_layernorm"
        yield from names.norm(("vision_tower", "post_norm"), post, config.hidden, True)
