"""Matrix products: with a weight gradient that needs no transposed copy on CPUs, and with frozen int8."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float


class Quantised(NamedTuple):
    """A frozen matrix: int8 values times a scale for each output channel (see `models/quantised.py`).

    A node of parameter trees: of the two arrays, their shapes, or their shardings.
    """

    values: Any
    """[..., i, o] int8."""
    scale: Any
    """[..., o] in the dtype of the computation."""


def matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"] | Quantised) -> Float[Array, "... o"]:
    """x @ kernel."""
    return _int8(x, *kernel) if isinstance(kernel, Quantised) else _float(x, kernel)


@jax.custom_vjp
def _float(x, kernel):
    """JAX's own rule computes the kernel's gradient as (g^T x)^T, for which XLA's CPU backend copies g into
    its transpose. In a LoRA term and in a feed-forward layer g is larger than x, and the copy takes a third
    of a step's time. Here the gradient is x^T g, which gives the same numbers.
    """
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(saved, g):
    x, kernel = saved
    lead = tuple(range(x.ndim - 1))
    return _transposed(g, kernel), jax.lax.dot_general(x, g, ((lead, lead), ((), ())))


_float.defvjp(_forward, _backward)


def _transposed(g, kernel):
    """g @ kernel^T."""
    return jax.lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))


@jax.custom_vjp
def _int8(x, values, scale):
    """The scale multiplies the product, so the matrix is only cast, which XLA can do within the product. By
    JAX's own rule the backward pass would keep each layer's cast matrix; here it casts again.
    """
    return (x @ values.astype(x.dtype)) * _channels(scale, x)


def _int8_forward(x, values, scale):
    return _int8(x, values, scale), (values, scale)


def _int8_backward(saved, g):
    values, scale = saved
    return _transposed(g * _channels(scale, g), values.astype(g.dtype)), None, None


_int8.defvjp(_int8_forward, _int8_backward)


def _channels(scale, like):
    return scale.reshape((1,) * (like.ndim - 1) + (-1,))
