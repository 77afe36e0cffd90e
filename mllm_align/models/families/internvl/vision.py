"""InternViT with a pixel shuffle of its features, and the projector."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_align.models.families.siglip import shuffled
from mllm_align.models.families.vit import Block, VitConfig
from mllm_align.models.layers import ACTIVATIONS, LayerNorm, Linear, parameter
from mllm_align.models.remat import scanned
from mllm_align.sharding import constrain

PROJECTOR_EPS = 1e-5


@dataclass(frozen=True)
class InternVitConfig(VitConfig):
    """layers: that are run. shuffle: side, in patches, of the cells that become one embedding each."""

    norm_eps: float = 1e-6
    layer_scale: bool = True
    shuffle: int = 2

    @property
    def places(self) -> int:
        """The class token stands before the patches."""
        return self.patches + 1

    @property
    def tokens(self) -> int:
        return (self.side // self.shuffle) ** 2

    @property
    def features(self) -> int:
        return self.hidden * self.shuffle**2


class InternVit(nn.Module):
    config: InternVitConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "n N C"], place: Int[Array, "n N 2"]) -> Float[Array, "n I F"]:
        """Hidden states after `config.layers` blocks without the class token's, a cell of patches side by
        side in each feature.

        A tile is whole: its patches have the places of the table, line by line.
        """
        c = self.config
        x = Linear(c.hidden, ("patch", "embed"), bias=True, name="patch_embedding")(patches)
        normal, lead = nn.initializers.normal(0.02), (None, None, "embed")
        first = parameter(self, "class_embedding", normal, lead, (1, 1, c.hidden))
        positions = parameter(self, "position_embedding", normal, lead, (1, c.places, c.hidden))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.hidden)), x], axis=1) + positions
        x = constrain(x, "rows", None, None)
        x, _ = scanned(Block, c.layers, self.remat)(c, name="layers")(x)
        return shuffled(x[:, 1:], c.side, c.shuffle)


class Projector(nn.Module):
    """A norm, and two linear maps with an activation between them."""

    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
        x = LayerNorm(PROJECTOR_EPS, name="norm")(x)
        x = ACTIVATIONS[self.activation](
            Linear(self.hidden, ("embed", "mlp"), bias=True, name="linear_1")(x)
        )
        return Linear(self.hidden, ("mlp", "embed"), bias=True, name="linear_2")(x)
