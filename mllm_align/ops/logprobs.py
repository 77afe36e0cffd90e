"""Log-probabilities of given tokens, without materializing logits [tokens, vocabulary]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logps(
    hidden: Float[Array, "B N D"],
    targets: Int[Array, "B N M"],
    kernel: Float[Array, "D V"],
    chunk: int = 1024,
) -> Float[Array, "B N M"]:
    """log p(target) in nats, float32, for M candidate next tokens of each hidden state.

    The projection runs over a few positions of every row at a time, at most max(chunk, B) hidden states,
    and is recomputed in the backward pass, so at most [max(chunk, B), V] logits exist at once. Rows stay
    separate, because they may be on different devices. Logits and the sum over the vocabulary are float32.
    """

    @jax.checkpoint
    def of_chunk(args):
        states, ids = args
        logits = jnp.einsum("bnd,dv->bnv", states, kernel, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, ids, axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    size, count, _ = hidden.shape
    positions = max(chunk // size, 1)
    if count <= positions:
        return of_chunk((hidden, targets))

    def parts(x):  # [B, N, ...] -> [parts, B, positions, ...]
        x = jnp.pad(x, ((0, 0), (0, -count % positions), (0, 0)))
        return x.reshape(size, -1, positions, x.shape[-1]).swapaxes(0, 1)

    out = jax.lax.map(of_chunk, (parts(hidden), parts(targets)))
    return out.swapaxes(0, 1).reshape(size, -1, targets.shape[-1])[:, :count]
