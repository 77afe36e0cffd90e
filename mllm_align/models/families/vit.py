"""What CLIP's, SigLIP's and InternVL's vision transformers share: settings, blocks, FLOPs.

The names of tensors are those of the first two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_align.models import names
from mllm_align.models.attention import full_attention
from mllm_align.models.layers import ACTIVATIONS, LayerNorm, Linear, RMSNorm, parameter
from mllm_align.models.names import Entry
from mllm_align.models.ranges import Whole, fields, wrong
from mllm_align.sharding import constrain

QK_EPS = 1e-6


@dataclass(frozen=True)
class VitConfig:
    """layers: that are run. image_size, patch_size: sides of a tile and of a patch in pixels."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    activation: str = "gelu"
    norm_eps: float = 1e-5
    rms_norm: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    """Queries and keys are normed, all heads together."""
    layer_scale: bool = False
    """What a block adds to its states is multiplied by a learned vector."""

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def places(self) -> int:
        """Rows of the table of position embeddings."""
        return self.patches

    @property
    def patch_width(self) -> int:
        return 3 * self.patch_size**2


def settings(at: str, given: dict[str, Any], ranges: dict[str, Any], remedy: str) -> dict[str, Any]:
    """The fields of a `VitConfig`, of config.json's vision_config. Raises InputError for values out of
    their ranges, and for sizes that do not go together."""
    v = fields(at, given, ranges, remedy, "vision_config.")
    width, heads = v["hidden_size"], v["num_attention_heads"]
    if width % heads:
        raise wrong(
            at, "vision_config.num_attention_heads", heads, f"a divisor of the width {width}", remedy
        )
    if v["patch_size"] > v["image_size"]:
        wanted = f"at most the image_size {v['image_size']}"
        raise wrong(at, "vision_config.patch_size", v["patch_size"], wanted, remedy)
    return {
        "hidden": width,
        "mlp": v["intermediate_size"],
        "layers": v["num_hidden_layers"],
        "heads": heads,
        "image_size": v["image_size"],
        "patch_size": v["patch_size"],
        "activation": v["hidden_act"],
        "norm_eps": float(v["layer_norm_eps"]),
    }


def feature_layer(at: str, layer: Any, blocks: int, remedy: str) -> int:
    """Blocks that run up to the hidden state that config.json's vision_feature_layer names: 0 is the input
    of the first one, -1 the output of the last. Raises InputError for one that is no block's output."""
    run = blocks + 1 + layer if type(layer) is int and layer < 0 else layer
    if run not in Whole(1, blocks):
        wanted = f"one of the outputs of the {blocks} vision layers"
        raise wrong(at, "vision_feature_layer", layer, wanted, remedy)
    return run


class Block(nn.Module):
    config: VitConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n S D"]):
        c = self.config
        split = (*x.shape[:2], c.heads, c.hidden // c.heads)
        norm = RMSNorm if c.rms_norm else LayerNorm
        h = norm(c.norm_eps, name="norm_1")(x)
        q, k, v = (
            Linear(c.hidden, ("embed", "vision_heads"), bias=c.qkv_bias, name=name)(h) for name in "qkv"
        )
        if c.qk_norm:
            q, k = (RMSNorm(QK_EPS, name=f"norm_{name}")(h) for name, h in (("q", q), ("k", k)))
        q, k, v = (h.reshape(split) for h in (q, k, v))
        h = full_attention(q, k, v).reshape(x.shape)
        h = Linear(c.hidden, ("vision_heads", "embed"), bias=True, name="o")(h)
        x = x + self.scaled(h, "scale_1")
        h = norm(c.norm_eps, name="norm_2")(x)
        h = Linear(c.mlp, ("embed", "mlp"), bias=True, name="fc_1")(h)
        h = ACTIVATIONS[c.activation](h)
        h = Linear(c.hidden, ("mlp", "embed"), bias=True, name="fc_2")(h)
        x = x + self.scaled(h, "scale_2")
        return constrain(x, "rows", None, None), None

    def scaled(self, h: Float[Array, "n S D"], name: str) -> Float[Array, "n S D"]:
        if not self.config.layer_scale:
            return h
        return h * parameter(self, name, nn.initializers.ones, ("norm",), h.shape[-1:])[None, None]


def tensors(config: VitConfig, module: str, bias: bool) -> Iterator[Entry]:
    """Of patch embedding, position embeddings and blocks. module: the tower's name in the checkpoint. bias:
    of the patch embedding."""
    c, tower, embeddings = config, ("vision_tower",), f"{module}.embeddings"
    shape = (c.hidden, 3, c.patch_size, c.patch_size)
    patch, path = f"{embeddings}.patch_embedding", (*tower, "patch_embedding")
    yield Entry(f"{patch}.weight", (*path, "kernel"), None, shape, "patch")
    if bias:
        yield names.same((*path, "bias"), f"{patch}.bias", (c.hidden,))
    places = (c.places, c.hidden)
    yield names.same((*tower, "position_embedding"), f"{embeddings}.position_embedding.weight", places)
    for i in range(c.layers):
        block, here = (*tower, "layers"), f"{module}.encoder.layers.{i}"
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
            square = (c.hidden, c.hidden)
            yield from names.linear((*block, ours), f"{here}.self_attn.{theirs}", square, True, i)
        yield from names.linear((*block, "fc_1"), f"{here}.mlp.fc1", (c.mlp, c.hidden), True, i)
        yield from names.linear((*block, "fc_2"), f"{here}.mlp.fc2", (c.hidden, c.mlp), True, i)
        yield from names.norm((*block, "norm_1"), f"{here}.layer_norm1", c.hidden, True, i)
        yield from names.norm((*block, "norm_2"), f"{here}.layer_norm2", c.hidden, True, i)


def block_flops(config: VitConfig) -> float:
    """Of all blocks, forward, for one tile. A matrix product of m x k by k x n counts 2 m k n."""
    c, tokens = config, config.places
    block = 2 * tokens * (4 * c.hidden**2 + 2 * c.hidden * c.mlp) + 4 * tokens**2 * c.hidden
    return c.layers * block
