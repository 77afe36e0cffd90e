"""Qwen2.5-VL's vision transformer: attention in windows of an image, in a few layers in all of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_align.models.families.qwen_vl import vision as qwen
from mllm_align.models.families.qwen_vl.vision import (
    EPS,
    PatchEmbedding,
    QwenVisionConfig,
    images_of,
    turns,
)
from mllm_align.models.layers import ACTIVATIONS, Linear, RMSNorm
from mllm_align.models.remat import scanned
from mllm_align.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Qwen25VisionConfig(QwenVisionConfig):
    """full: numbers of the layers whose attention is within the whole image."""

    full: tuple[int, ...] = (7, 15, 23, 31)
    patch_size: int = 14
    activation: str = "silu"
    window: int = 4

    @property
    def longest(self) -> int:
        """Patches of a whole window."""
        return (self.window * self.merge) ** 2

    @property
    def stacks(self) -> tuple[tuple[bool, int], ...]:
        """Layers in turn: (whether attention is within the whole image, how many of them in a row)."""
        runs = groupby(range(self.layers), lambda layer: layer in self.full)
        return tuple((full, len(list(layers))) for full, layers in runs)


class Qwen25Tower(nn.Module):
    config: Qwen25VisionConfig
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: Float[Array, "B N C"], place: Int[Array, "B N 2"]) -> Float[Array, "B I F"]:
        """Of each cell the last states of its patches, side by side. The cells of an image come window by
        window (`QwenLayout.order`)."""
        c = self.config
        x = PatchEmbedding(c, bias=False, name="patch_embedding")(patches)
        x = constrain(x, "rows", None, None)
        turned, images = turns(c, place), images_of(place)
        windows = windows_of(place, images, c.window * c.merge)
        for i, (full, layers) in enumerate(c.stacks):
            block = scanned(Block, layers, self.remat, shared=2)
            here = block(c, None if full else c.longest, name=f"layers_{i}")
            x, _ = here(x, turned, images if full else windows)
        return x.reshape(len(x), -1, c.cell)


def windows_of(place: Int[Array, "B N 2"], images: Int[Array, "B N"], side: int) -> Int[Array, "B N"]:
    """Number of each patch's window, of `side` patches in square, from 1; 0 for a patch that only fills.

    images: as `images_of`. The patches of a window follow each other.
    """
    at = jnp.concatenate([images[:, :, None], place.astype(images.dtype) // side], axis=2)
    starts = (at[:, 1:] != at[:, :-1]).any(-1)
    count = 1 + jnp.cumsum(starts, axis=1)
    return jnp.where(images > 0, jnp.pad(count, ((0, 0), (1, 0)), constant_values=1), 0)


class Block(qwen.Block):
    """longest: patches of the longest segment, where they are windows."""

    config: Qwen25VisionConfig
    longest: int | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], turned: Float[Array, "B N E"], segments: Int[Array, "B N"]
    ):
        c = self.config
        h = RMSNorm(EPS, name="norm_1")(x)
        x = x + self.attended(h, turned, segments, self.longest)
        h = RMSNorm(EPS, name="norm_2")(x)
        gate = Linear(c.mlp, ("embed", "mlp"), bias=True, name="gate")(h)
        up = Linear(c.mlp, ("embed", "mlp"), bias=True, name="up")(h)
        down = Linear(c.hidden, ("mlp", "embed"), bias=True, name="down")
        return constrain(x + down(ACTIVATIONS[c.activation](gate) * up), "rows", None, None), None
