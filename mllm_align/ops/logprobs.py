"""Log-probabilities of given tokens without ever holding [tokens, vocabulary]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logps(
    hidden: Float[Array, "N D"],
    targets: Int[Array, "N M"],
    kernel: Float[Array, "D V"],
    chunk: int = 1024,
) -> Float[Array, "N M"]:
    """log p(target) in nats, float32, for M candidate next tokens of each hidden state.

    The projection runs over `chunk` hidden states at a time and is run again in the backward pass, so at
    most [chunk, V] logits exist at once. Logits and the sum over the vocabulary are float32.
    """

    @jax.checkpoint
    def of_chunk(args):
        states, ids = args
        logits = jnp.dot(states, kernel, preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, ids, axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    count = hidden.shape[0]
    if count <= chunk:
        return of_chunk((hidden, targets))
    extra = -count % chunk
    hidden = jnp.pad(hidden, ((0, extra), (0, 0))).reshape(-1, chunk, hidden.shape[1])
    targets = jnp.pad(targets, ((0, extra), (0, 0))).reshape(-1, chunk, targets.shape[1])
    out = jax.lax.map(of_chunk, (hidden, targets))
    return out.reshape(-1, targets.shape[-1])[:count]
