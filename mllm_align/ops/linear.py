"""A matrix product whose weight gradient is cheap on CPUs."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


@jax.custom_vjp
def matmul(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """x @ kernel.

    The automatic rule writes the kernel's gradient as (g^T x)^T, and XLA's CPU backend then copies g to
    its transpose, which is the larger of the two in a LoRA term and in a feed-forward layer: a third of
    the time of a step. Here it is x^T g, the same numbers.
    """
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(saved, g):
    x, kernel = saved
    lead = tuple(range(x.ndim - 1))
    d_x = jax.lax.dot_general(g, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return d_x, jax.lax.dot_general(x, g, ((lead, lead), ((), ())))


matmul.defvjp(_forward, _backward)
