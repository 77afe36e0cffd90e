"""What CLIP's and SigLIP's vision transformers share: blocks, names of tensors, FLOPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_align.models import names
from mllm_align.models.attention import full_attention
from mllm_align.models.layers import ACTIVATIONS, LayerNorm, Linear
from mllm_align.models.names import Entry
from mllm_align.sharding import constrain


class VitConfig(Protocol):
    """layers: that are run. places: rows of the table of position embeddings."""

    @property
    def hidden(self) -> int: ...
    @property
    def mlp(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def places(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def norm_eps(self) -> float: ...


class Block(nn.Module):
    config: VitConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n S D"]):
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
