"""What Qwen's vision transformers share: images of any size side by side in one row, turned by two axes.

The patches of an image come cell by cell, so that merging is a reshape. A tile is one cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mllm_align.models.attention import full_attention
from mllm_align.models.layers import ACTIVATIONS, Linear, frequencies, parameter, rope, rotations
from mllm_align.ops.linear import matmul

EPS = 1e-6  # of all norms
THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """patch_size: side of a patch in pixels. frames: copies of an image that the patch embedding was made
    for. merge: side, in patches, of the cells that become one embedding each. window: side, in cells, of
    the squares that attention keeps to in some layers; 0 for none. out: width of the decoder.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    out: int
    patch_size: int
    activation: str
    frames: int = 2
    merge: int = 2
    window: int = 0

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
        return self.cell


def images_of(place: Int[Array, "B N 2"]) -> Int[Array, "B N"]:
    """Number of each patch's image, from 1; 0 for a patch that only fills. An image's first patch is at row
    and column 0."""
    starts, real = (place == 0).all(-1), place[:, :, 0] >= 0
    return jnp.where(real, jnp.cumsum(starts, axis=1), 0)


def turns(config: QwenVisionConfig, place: Int[Array, "B N 2"]) -> Float[Array, "B N E"]:
    """As `layers.rotations`: half of a head's frequencies turn by the row, half by the column."""
    quarter = config.hidden // config.heads // 4
    frequency = jnp.tile(frequencies(2 * quarter, THETA), 2)
    return rotations(place.swapaxes(1, 2), frequency, (0,) * quarter + (1,) * quarter)


class PatchEmbedding(nn.Module):
    """A convolution over the copies of an image, which are equal: its kernel is summed over them."""

    config: QwenVisionConfig
    bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N D"]:
        c = self.config
        shape = (c.frames * c.patch_width, c.hidden)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), ("patch", "embed"), shape)
        frames = kernel.astype(jnp.float32).reshape(3, c.frames, -1, c.hidden)
        once = frames.sum(1).reshape(-1, c.hidden).astype(x.dtype)
        x = matmul(x, once)
        if self.bias:
            x = x + parameter(self, "bias", nn.initializers.zeros, ("embed",), (c.hidden,))[None, None]
        return x


class Block(nn.Module):
    """What all blocks have; norms and feed-forward are a family's own."""

    config: QwenVisionConfig

    def attended(
        self,
        h: Float[Array, "B N D"],
        turned: Float[Array, "B N E"],
        segments: Int[Array, "B N"],
        longest: int | None = None,
    ) -> Float[Array, "B N D"]:
        """Attention of every patch to those of its segment. longest: as in `models.attention`."""
        q, k, v = Heads(self.config, name="qkv")(h)
        q, k = (rope(each.astype(jnp.float32), turned).astype(h.dtype) for each in (q, k))
        out = full_attention(q, k, v, segments, longest).reshape(h.shape)
        return Linear(self.config.hidden, ("vision_heads", "embed"), bias=True, name="o")(out)


class Heads(nn.Module):
    """Queries, keys and values: one tensor in checkpoints, cut between heads here."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> list[Float[Array, "B N H E"]]:
        c, split = self.config, (*x.shape[:2], self.config.heads, -1)
        lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        kernel = parameter(self, "kernel", lecun, ("embed", None, "vision_heads"), (c.hidden, 3, c.hidden))
        bias = parameter(self, "bias", zeros, (None, "vision_heads"), (3, c.hidden))
        kernels = [jax.tree.map(lambda x, i=i: x[..., i, :], kernel) for i in range(3)]  # maybe `Quantised`
        made = [matmul(x, each) + bias[None, None, i] for i, each in enumerate(kernels)]
        return [checkpoint_name(y, name).reshape(split) for y, name in zip(made, "qkv", strict=True)]


class Merger(nn.Module):
    """Two linear maps of a cell's states. norm: `layers.LayerNorm` or `layers.RMSNorm`; width: of what is
    normed, a patch or the cell."""

    out: int
    width: int
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        norm = self.norm(EPS, name="norm")  # type: ignore[call-arg]
        h = norm(x.reshape(*x.shape[:-1], -1, self.width)).reshape(x.shape)
        h = Linear(x.shape[-1], ("embed", "mlp"), bias=True, name="linear_1")(h)
        h = ACTIVATIONS["gelu"](h)
        return Linear(self.out, ("mlp", "embed"), bias=True, name="linear_2")(h)
