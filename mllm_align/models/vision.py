"""CLIP's vision transformer, up to the layer whose output LLaVA reads."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_align.models.attention import full_attention
from mllm_align.models.config import VisionConfig
from mllm_align.models.layers import ACTIVATIONS, LayerNorm, Linear, parameter, scanned
from mllm_align.sharding import constrain


class VisionBlock(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "N S D"]):
        c = self.config
        split = (*x.shape[:2], c.heads, c.hidden // c.heads)
        h = LayerNorm(c.norm_eps, name="norm_1")(x)
        q, k, v = (
            Linear(c.hidden, ("embed", "vision_heads"), bias=True, name=name)(h).reshape(split)
            for name in ("q", "k", "v")
        )
        h = full_attention(q, k, v).reshape(x.shape)
        x = x + Linear(c.hidden, ("vision_heads", "embed"), bias=True, name="o")(h)
        h = LayerNorm(c.norm_eps, name="norm_2")(x)
        h = Linear(c.mlp, ("embed", "mlp"), bias=True, name="fc_1")(h)
        h = ACTIVATIONS[c.activation](h)
        x = x + Linear(c.hidden, ("mlp", "embed"), bias=True, name="fc_2")(h)
        return constrain(x, "rows", None, None), None


class VisionTower(nn.Module):
    config: VisionConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, tiles: Float[Array, "N h w 3"]) -> Float[Array, "N I D"]:
        """Hidden states after `config.layers` blocks, class token dropped unless the config keeps it."""
        c = self.config
        count, patch, side = tiles.shape[0], c.patch_size, c.side
        # A convolution whose stride is its width is a matrix product over patches. Pixels that fill no
        # whole patch are left out, as a strided convolution leaves them out.
        tiles = tiles[:, : side * patch, : side * patch]
        patches = tiles.reshape(count, side, patch, side, patch, 3).swapaxes(2, 3)
        patches = patches.reshape(count, side**2, patch * patch * 3)
        x = Linear(c.hidden, ("patch", "embed"), name="patch_embedding")(patches)
        normal = nn.initializers.normal(0.02)
        class_embedding = parameter(self, "class_embedding", normal, ("norm",), (c.hidden,))
        places = (side**2 + 1, c.hidden)
        positions = parameter(self, "position_embedding", normal, (None, "embed"), places)
        first = jnp.broadcast_to(class_embedding[None, None], (count, 1, c.hidden))
        x = jnp.concatenate([first, x], axis=1) + positions[None]
        x = constrain(LayerNorm(c.norm_eps, name="pre_norm")(x), "rows", None, None)
        x, _ = scanned(VisionBlock, c.layers, self.remat)(c, name="layers")(x)
        return x if c.keep_class_token else x[:, 1:]
