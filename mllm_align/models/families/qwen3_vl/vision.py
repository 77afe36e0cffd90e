"""Qwen3-VL's vision transformer: images of any size side by side in one row, cells of patches merged.

The patches of an image come cell by cell, so that merging is a reshape. A tile is one cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_align.models.attention import full_attention
from mllm_align.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    frequencies,
    parameter,
    rope,
    rotations,
    scanned,
)
from mllm_align.ops.linear import matmul
from mllm_align.sharding import constrain

EPS = 1e-6  # of all norms
THETA = 10000.0


@dataclass(frozen=True)
class QwenVisionConfig:
    """patch_size: side of a patch in pixels. frames: copies of an image that the patch embedding was made
    for. merge: side, in patches, of the cells that become one embedding each. side: of the square table of
    position embeddings. deepstack: numbers of the layers after which a cell's states become what a layer of
    the decoder adds. out: width of the decoder.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    side: int
    out: int
    deepstack: tuple[int, ...]
    patch_size: int = 16
    frames: int = 2
    merge: int = 2
    activation: str = "gelu_pytorch_tanh"

    @property
    def patches(self) -> int:
        return self.merge**2

    @property
    def patch_width(self) -> int:
        return 3 * self.patch_size**2

    @property
    def tokens(self) -> int:
        return 1

    @property
    def cell(self) -> int:
        """Numbers of the states of a cell's patches."""
        return self.hidden * self.merge**2

    @property
    def features(self) -> int:
        return self.cell + len(self.deepstack) * self.out

    @property
    def stacks(self) -> tuple[int, ...]:
        """Layers that run in turn up to each of `deepstack`, and after the last of them."""
        bounds = [0, *(1 + layer for layer in self.deepstack), self.layers]
        return tuple(stop - start for start, stop in pairwise(bounds))


class QwenTower(nn.Module):
    config: QwenVisionConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "B N C"], place: Int[Array, "B N 2"]) -> Float[Array, "B I F"]:
        """Of each cell the last states of its patches, side by side, then what each deepstack merger makes
        of earlier ones."""
        c = self.config
        size, count = patches.shape[:2]
        images, last = extents(place)
        x = PatchEmbedding(c, name="patch_embedding")(patches)
        x = constrain(x + Positions(c, name="positions")(place, last).astype(x.dtype), "rows", None, None)
        quarter = c.hidden // c.heads // 4
        frequency = jnp.tile(frequencies(2 * quarter, THETA), 2)
        turned = rotations(place.swapaxes(1, 2), frequency, (0,) * quarter + (1,) * quarter)
        deep = []
        for i, layers in enumerate(c.stacks):
            if layers:
                block = scanned(Block, layers, self.remat, shared=2)
                x, _ = block(c, name=f"layers_{i}")(x, turned, images)
            if i < len(c.deepstack):
                cells = x.reshape(size, count // c.patches, c.cell)
                deep.append(Merger(c.out, c.cell, name=f"merger_{i}")(cells))
        return jnp.concatenate([x.reshape(size, count // c.patches, c.cell), *deep], axis=-1)


def extents(place: Int[Array, "B N 2"]) -> tuple[Int[Array, "B N"], Int[Array, "B N 2"]]:
    """(number of each patch's image, 0 for a patch that only fills; last row and column of that image).

    An image's first patch is at row and column 0, its last one at the last ones.
    """
    count = place.shape[1]
    starts, real = (place == 0).all(-1), place[:, :, 0] >= 0
    images = jnp.where(real, jnp.cumsum(starts, axis=1), 0)
    ends = jnp.concatenate([starts | ~real, jnp.ones_like(real[:, :1])], axis=1)[:, 1:]
    at = jnp.where(ends, jnp.arange(count)[None], count - 1)
    at = jax.lax.cummin(at, axis=1, reverse=True)
    return images, jnp.take_along_axis(place, at[:, :, None], axis=1)


class PatchEmbedding(nn.Module):
    """A convolution over the copies of an image, which are equal: its kernel is summed over them."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N D"]:
        c = self.config
        shape = (c.frames * c.patch_width, c.hidden)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), ("patch", "embed"), shape)
        bias = parameter(self, "bias", nn.initializers.zeros, ("embed",), (c.hidden,))
        frames = kernel.astype(jnp.float32).reshape(3, c.frames, -1, c.hidden)
        once = frames.sum(1).reshape(-1, c.hidden).astype(x.dtype)
        return matmul(x, once) + bias[None, None]


class Positions(nn.Module):
    """Position embeddings of a square table, resampled to each image's grid: corners meet."""

    config: QwenVisionConfig

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


class Block(nn.Module):
    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], turned: Float[Array, "B N E"], images: Int[Array, "B N"]):
        c = self.config
        h = LayerNorm(EPS, name="norm_1")(x)
        q, k, v = Heads(c, name="qkv")(h)
        q, k = (rope(each.astype(jnp.float32), turned).astype(x.dtype) for each in (q, k))
        h = full_attention(q, k, v, images).reshape(x.shape)
        x = x + Linear(c.hidden, ("vision_heads", "embed"), bias=True, name="o")(h)
        h = LayerNorm(EPS, name="norm_2")(x)
        h = Linear(c.mlp, ("embed", "mlp"), bias=True, name="fc_1")(h)
        h = ACTIVATIONS[c.activation](h)
        x = x + Linear(c.hidden, ("mlp", "embed"), bias=True, name="fc_2")(h)
        return constrain(x, "rows", None, None), None


class Heads(nn.Module):
    """Queries, keys and values: one tensor in checkpoints, cut between heads here."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> list[Float[Array, "B N H E"]]:
        c, split = self.config, (*x.shape[:2], self.config.heads, -1)
        lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        kernel = parameter(self, "kernel", lecun, ("embed", None, "vision_heads"), (c.hidden, 3, c.hidden))
        bias = parameter(self, "bias", zeros, (None, "vision_heads"), (3, c.hidden))
        return [(matmul(x, kernel[:, i]) + bias[None, None, i]).reshape(split) for i in range(3)]


class Merger(nn.Module):
    """Two linear maps of a cell's states; `norm`: width of what is normed, a patch or the cell."""

    out: int
    norm: int

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        h = LayerNorm(EPS, name="norm")(x.reshape(*x.shape[:-1], -1, self.norm)).reshape(x.shape)
        h = Linear(x.shape[-1], ("embed", "mlp"), bias=True, name="linear_1")(h)
        h = ACTIVATIONS["gelu"](h)
        return Linear(self.out, ("mlp", "embed"), bias=True, name="linear_2")(h)


class Projector(nn.Module):
    """The merger of the last states; what the others made goes along."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... F"]) -> Float[Array, "... D"]:
        """[..., (1 + n) D]: the embedding, then what each of the n first layers of the decoder adds."""
        c = self.config
        own, deep = x[..., : c.cell], x[..., c.cell :]
        return jnp.concatenate([Merger(c.out, c.hidden, name="merger")(own), deep], axis=-1)
