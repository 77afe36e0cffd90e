"""What attention kernels are checked against: outputs and gradients of the plain definition."""

import jax
import jax.numpy as jnp
import numpy as np

from mllm_align.ops import attention

PREFIX, LENGTH = 150, 70  # of rows for kernels: nothing ends where a block of 128 does


def allowed(responses):
    """[S, S]: may the query see the key?"""
    total = PREFIX + responses * LENGTH
    place = np.arange(total)
    whose = np.where(place < PREFIX, 0, 1 + (place - PREFIX) // LENGTH)
    same = (whose[:, None] == whose[None]) | (whose[None] == 0)
    return same & (place[None] <= place[:, None])


def pulled(attend, q, k, v, cotangent, dtype=jnp.float32):
    """Output and gradients."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(cotangent))

    found = run(*(jnp.asarray(x, dtype) for x in (q, k, v, cotangent)))
    assert all(x.dtype == dtype and np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    return [np.asarray(x, np.float32) for x in found]


def defined(q, k, v, cotangent, visible, sees, prefix, responses):
    """Output and gradients by `ops/attention.py`; a query that sees no key counts for nothing.

    The prefix is followed by `responses` responses of one length.
    """
    place = np.arange(q.shape[1])
    length = (q.shape[1] - prefix) // max(responses, 1)
    late = prefix + (place - prefix) % max(length, 1)
    at = jnp.asarray(np.broadcast_to(np.where(place < prefix, place, late), visible.shape), jnp.int32)

    def attend(q, k, v):
        return attention.prompt_group_attention(q, k, v, at, at, visible, prefix, responses)

    out, *grads = pulled(attend, q, k, v, cotangent * sees)
    return [out * sees, *grads]
