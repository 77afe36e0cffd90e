"""Qwen3-VL's vision transformer: position embeddings of any grid, features of several layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_align.models.families.qwen_vl import vision as qwen
from mllm_align.models.families.qwen_vl.vision import (
    EPS,
    Merger,
    PatchEmbedding,
    QwenVisionConfig,
    images_of,
    turns,
)
from mllm_align.models.layers import ACTIVATIONS, LayerNorm, Linear, parameter
from mllm_align.models.remat import scanned
from mllm_align.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Qwen3VisionConfig(QwenVisionConfig):
    """side: of the square table of position embeddings. deepstack: numbers of the layers after which a
    cell's states become what a layer of the decoder adds."""

    side: int
    deepstack: tuple[int, ...]
    patch_size: int = 16
    activation: str = "gelu_pytorch_tanh"

    @property
    def features(self) -> int:
        return self.cell + len(self.deepstack) * self.out

    @property
    def stacks(self) -> tuple[int, ...]:
        """Layers that run in turn up to each of `deepstack`, and after the last of them."""
        bounds = [0, *(1 + layer for layer in self.deepstack), self.layers]
        return tuple(stop - start for start, stop in pairwise(bounds))


class Qwen3Tower(nn.Module):
    config: Qwen3VisionConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "B N C"], place: Int[Array, "B N 2"]) -> Float[Array, "B I F"]:
        """Of each cell the last states of its patches, side by side, then what each deepstack merger makes
        of earlier ones."""
        c = self.config
        size, count = patches.shape[:2]
        images, last = extents(place)
        x = PatchEmbedding(c, bias=True, name="patch_embedding")(patches)
        x = constrain(x + Positions(c, name="positions")(place, last).astype(x.dtype), "rows", None, None)
        turned, deep = turns(c, place), []
        for i, layers in enumerate(c.stacks):
            if layers:
                block = scanned(Block, layers, self.remat, shared=2)
                x, _ = block(c, name=f"layers_{i}")(x, turned, images)
            if i < len(c.deepstack):
                cells = x.reshape(size, count // c.patches, c.cell)
                deep.append(Merger(c.out, c.cell, LayerNorm, name=f"merger_{i}")(cells))
        return jnp.concatenate([x.reshape(size, count // c.patches, c.cell), *deep], axis=-1)


def extents(place: Int[Array, "B N 2"]) -> tuple[Int[Array, "B N"], Int[Array, "B N 2"]]:
    """(number of each patch's image, as `images_of`; last row and column of that image).

    An image's last patch is at the last ones.
    """
    images, count = images_of(place), place.shape[1]
    starts = (place == 0).all(-1) | (images == 0)
    ends = jnp.concatenate([starts, jnp.ones_like(starts[:, :1])], axis=1)[:, 1:]
    at = jnp.where(ends, jnp.arange(count)[None], count - 1)
    at = jax.lax.cummin(at, axis=1, reverse=True)
    return images, jnp.take_along_axis(place, at[:, :, None], axis=1)


class Positions(nn.Module):
    """Position embeddings of a square table, resampled to each image's grid: corners meet."""

    config: Qwen3VisionConfig

    @nn.compact
    def __call__(self, place: Int[Array, "B N 2"], last: Int[Array, "B N 2"]) -> Float[Array, "B N D"]:
        """In float32."""
        c = self.config
        normal, shape = nn.initializers.normal(0.02), (c.side**2, c.hidden)
        table = parameter(self, "embedding", normal, (None, "embed"), shape)
        place = jnp.maximum(place, 0).astype(jnp.float32)
        at = place * (c.side - 1) / jnp.maximum(last, 1).astype(jnp.float32)
        before = jnp.minimum(jnp.floor(at), c.side - 1)
        share, before = at - before, before.astype(jnp.int32)
        out = jnp.zeros((*place.shape[:2], c.hidden), jnp.float32)
        for down in (0, 1):
            for across in (0, 1):
                after = jnp.array((down, across))[None, None]
                row, column = jnp.moveaxis(jnp.minimum(before + after, c.side - 1), -1, 0)
                weight = jnp.where(after == 1, share, 1 - share).prod(-1, keepdims=True)
                out = out + weight * table[row * c.side + column].astype(jnp.float32)
        return out


class Block(qwen.Block):
    config: Qwen3VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], turned: Float[Array, "B N E"], images: Int[Array, "B N"]):
        c = self.config
        x = x + self.attended(LayerNorm(EPS, name="norm_1")(x), turned, images)
        h = LayerNorm(EPS, name="norm_2")(x)
        h = Linear(c.mlp, ("embed", "mlp"), bias=True, name="fc_1")(h)
        h = ACTIVATIONS[c.activation](h)
        x = x + Linear(c.hidden, ("mlp", "embed"), bias=True, name="fc_2")(h)
        return constrain(x, "rows", None, None), None


class Projector(nn.Module):
    """The merger of the last states; what the others made goes along."""

    config: Qwen3VisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
        """[..., (1 + n) D]: the embedding, then what each of the n first layers of the decoder adds."""
        c = self.config
        own, deep = x[..., : c.cell], x[..., c.cell :]
        return jnp.concatenate([Merger(c.out, c.hidden, LayerNorm, name="merger")(own), deep], axis=-1)
