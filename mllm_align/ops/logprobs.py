"""Next-token distributions at given places, without materializing logits [tokens, vocabulary].

The projection runs over a few positions of every row at a time, at most max(chunk, B) hidden states, and is
recomputed in the backward pass, so at most [max(chunk, B), V] logits exist at once. Rows stay separate,
because they may be on different devices. Logits and sums over the vocabulary are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logps(
    hidden: Float[Array, "B N D"],
    targets: Int[Array, "B N M"],
    kernel: Float[Array, "D V"],
    chunk: int = 1024,
) -> Float[Array, "B N M"]:
    """log p(target) in nats, float32, for M candidate next tokens of each hidden state."""

    @jax.checkpoint
    def of_chunk(states, ids):
        logits = _logits(states, kernel)
        chosen = jnp.take_along_axis(logits, ids, axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    return _in_chunks(of_chunk, hidden, targets, chunk)


def token_kl(
    hidden: Float[Array, "B N D"],
    kernel: Float[Array, "D V"],
    reference: Float[Array, "B N D"],
    reference_kernel: Float[Array, "D V"],
    chunk: int = 1024,
) -> Float[Array, "B N"]:
    """KL(reference || policy) of the next token after each place, in nats, float32.

    hidden, kernel: of the policy. Nothing of the reference gets a gradient.
    """
    reference, reference_kernel = jax.lax.stop_gradient((reference, reference_kernel))

    @jax.checkpoint
    def of_chunk(states, others):
        policy = jax.nn.log_softmax(_logits(states, kernel))
        fixed = jax.nn.log_softmax(_logits(others, reference_kernel))
        return (jnp.exp(fixed) * (fixed - policy)).sum(-1, keepdims=True)

    return _in_chunks(of_chunk, hidden, reference, chunk)[..., 0]


def _logits(states: Float[Array, "B n D"], kernel: Float[Array, "D V"]) -> Float[Array, "B n V"]:
    return jnp.einsum("bnd,dv->bnv", states, kernel, preferred_element_type=jnp.float32)


def _in_chunks(
    of_chunk: Callable[..., Float[Array, "B n M"]],
    first: Float[Array, "B N D"],
    second: Array,
    chunk: int,
) -> Float[Array, "B N M"]:
    """A function of a few positions of two arrays, part by part."""
    size, count, _ = first.shape
    positions = max(chunk // size, 1)
    if count <= positions:
        return of_chunk(first, second)

    def parts(x):  # [B, N, ...] -> [parts, B, positions, ...]
        x = jnp.pad(x, ((0, 0), (0, -count % positions), (0, 0)))
        return x.reshape(size, -1, positions, x.shape[-1]).swapaxes(0, 1)

    out = jax.lax.map(lambda args: of_chunk(*args), (parts(first), parts(second)))
    return out.swapaxes(0, 1).reshape(size, -1, out.shape[-1])[:, :count]
