"""Small modules that the vision tower and the decoder share.

Modules name parameters and their logical axes, nothing else. They compute in the dtype of their input;
norms and rotary angles are float32 inside, as in the reference implementations.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mllm_align.models.config import LinearRope, Llama3Rope
from mllm_align.ops.linear import matmul

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
    "silu": jax.nn.silu,
}


def parameter(
    module: nn.Module, name: str, init: Any, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> jax.Array:
    """A parameter of the module under its logical axes.

    Where flax finds one, it traces `init` to compare the shapes, which took a fourth of a step's tracing;
    so it is asked only where there is none, or one of another shape, which it refuses.
    """
    value: Any = None
    if module.has_variable("params", name):
        value = nn.unbox(module.get_variable("params", name))
    if value is None or jax.tree.leaves(value)[0].shape != shape:
        value = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    return value


class Linear(nn.Module):
    """x @ kernel (+ bias), plus the low-rank term where the `lora` collection has one for this place.

    The collection holds `a` [in, r] and `b` [r, out], already scaled by alpha / r. The kernel may be
    `Quantised`.
    """

    features: int
    axes: tuple[str, str]
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), self.axes, shape)
        y = matmul(x, kernel)
        if self.bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.axes[1:], shape[1:])
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        if self.has_variable("lora", "a"):
            low_rank = checkpoint_name(matmul(x, self.get_variable("lora", "a")), "low_rank")
            y = y + matmul(low_rank, self.get_variable("lora", "b"))
        return checkpoint_name(y, self.name or "")  # by which rematerialisation tells it (`remat.py`)


class RMSNorm(nn.Module):
    """offset: added to the stored gain. Gemma's 1 makes it `1 + scale`, multiplied in float32; Llama's gain
    is multiplied after the cast."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        start = nn.initializers.constant(1.0 - self.offset)
        scale = parameter(self, "scale", start, ("norm",), x.shape[-1:])
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        if self.offset:
            return (wide * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)
        return wide.astype(x.dtype) * scale


class LayerNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        flat = (1,) * (x.ndim - 1) + (-1,)
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), x.shape[-1:]).reshape(flat)
        bias = parameter(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1:]).reshape(flat)
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * scale + bias


def frequencies(
    size: int, theta: float, scaling: Llama3Rope | LinearRope | None = None
) -> Float[Array, " E/2"]:
    """Rotary frequencies of heads of `size`, in radians per position."""
    half = size // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency
    if isinstance(scaling, LinearRope):
        return frequency / scaling.factor
    s, turns = scaling, scaling.original * frequency / (2 * jnp.pi)
    kept = jnp.clip((turns - s.low) / (s.high - s.low), 0, 1)
    return frequency * ((1 - kept) / s.factor + kept)


def rotations(
    positions: Int[Array, "B A S"], frequency: Float[Array, " E/2"], axes: tuple[int, ...]
) -> Float[Array, "B S E"]:
    """Cosines, then sines, of the angles that `rope` turns heads by; the same in all layers.

    axes: for each of the frequencies the axis of positions that it turns by (M-RoPE has several).
    """
    at = positions.astype(jnp.float32)[:, np.array(axes)].swapaxes(1, 2)
    angle = at * frequency[None, None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def rope(x: Float[Array, "B S H E"], turned: Float[Array, "B S E"]) -> Float[Array, "B S H E"]:
    """Rotary embedding in the half-split layout of Llama checkpoints (Su et al. 2021, eq. 34).

    turned: cosines and sines of `rotations`.
    """
    cos, sin = jnp.split(turned[:, :, None, :].astype(x.dtype), 2, axis=-1)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
