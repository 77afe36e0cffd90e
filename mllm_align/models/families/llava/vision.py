"""CLIP's vision transformer up to the layer whose output LLaVA reads, and LLaVA's projector."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_align.models.families.vit import Block, VitConfig
from mllm_align.models.layers import ACTIVATIONS, LayerNorm, Linear, parameter
from mllm_align.models.remat import scanned
from mllm_align.sharding import constrain


@dataclass(frozen=True)
class ClipConfig(VitConfig):
    """`layers` counts those that are run: up to the feature layer."""

    activation: str = "quick_gelu"
    keep_class_token: bool = False

    @property
    def places(self) -> int:
        """The class token stands before the patches."""
        return self.patches + 1

    @property
    def tokens(self) -> int:
        return self.patches + int(self.keep_class_token)

    @property
    def features(self) -> int:
        return self.hidden


class ClipTower(nn.Module):
    config: ClipConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "n N C"], place: Int[Array, "n N 2"]) -> Float[Array, "n I F"]:
        """Hidden states after `config.layers` blocks, class token dropped unless the config keeps it.

        A convolution whose stride is its width is a matrix product over patches. They fill their tile line
        by line, so that `place` tells nothing new.
        """
        c = self.config
        x = Linear(c.hidden, ("patch", "embed"), name="patch_embedding")(patches)
        normal = nn.initializers.normal(0.02)
        class_embedding = parameter(self, "class_embedding", normal, ("norm",), (c.hidden,))
        places = (c.places, c.hidden)
        positions = parameter(self, "position_embedding", normal, (None, "embed"), places)
        first = jnp.broadcast_to(class_embedding[None, None], (len(patches), 1, c.hidden))
        x = jnp.concatenate([first, x], axis=1) + positions[None]
        x = constrain(LayerNorm(c.norm_eps, name="pre_norm")(x), "rows", None, None)
        x, _ = scanned(Block, c.layers, self.remat)(c, name="layers")(x)
        return x if c.keep_class_token else x[:, 1:]


class Projector(nn.Module):
    """Two linear maps with an activation between them."""

    hidden: int
    activation: str
    bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
        x = Linear(self.hidden, ("embed", "mlp"), bias=self.bias, name="linear_1")(x)
        x = ACTIVATIONS[self.activation](x)
        return Linear(self.hidden, ("mlp", "embed"), bias=self.bias, name="linear_2")(x)
