"""Attention by cuDNN's flash kernels (NVIDIA GPUs, 16-bit), through `jax.nn.dot_product_attention`.

The kernels support sequence lengths, causality from the first key on, or a bias of [queries, keys]. A
prompt group therefore takes two calls: the prefix's self-attention is causal and has lengths; the few rows
of the responses attend to all keys of the row through a bias [K * R, S]. No [S, S] array is materialized.

These calls rely on the following, as found in JAX 0.10 (`jax/_src/cudnn/fused_attention_stablehlo.py`), its
tests and the kernels' list of unsupported configurations:

- grouped heads are supported, with a head size that is a multiple of 8 and at most 128; so are lengths with
  causality, and lengths with a mask. For the gradient, the numbers of queries and keys must be even, with a
  bias or without;
- the gradient of a bias [B, 1, queries, keys] is always computed. For it the backward pass allocates the
  gradients of this call's scores: 2 bytes for each of B * H * K * R * S;
- without lengths, the backward pass of some versions gives NaN if the number of keys is not a multiple of
  the tile size, 128. Lengths are therefore always given, and arrays are padded to whole tiles if a bias is;
- a query without a visible key may give NaN. The mask of such a query is therefore set to True, and its
  output to 0;
- outputs and gradients for keys after a row's length are undefined and never used.

The functions work on local arrays: call them inside `shard_map` over rows and heads. `implementation="xla"`
runs the same calls on any platform, with the scores in memory: for tests.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mllm_align.ops import attention as xla

TILE = 128  # of queries and keys in the kernels
FORWARD = "dot_product_attention_fwd_wrapper"  # the primitive that JAX differentiates

Implementation = Literal["cudnn", "xla"]


def prompt_group_attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B S G E"],
    v: Float[Array, "B S G E"],
    visible: Bool[Array, "B S"],
    prefix: int,
    responses: int,
    implementation: Implementation = "cudnn",
) -> Float[Array, "B Q H E"]:
    """Causal attention over rows laid out as [prefix | response 1 | ... | response K].

    Like `mllm_align.ops.attention.prompt_group_attention`, except that causality follows the index in the
    row, and that a query without a visible key gives zeros and no gradient. The queries are those of all S
    rows, or of the prefix's last rows followed by the responses.

    If the whole prefix is among the queries, its visible keys must be its first ones, without holes: only
    their number is used. Masked image embeddings (BDHS) are holes.
    """
    rows, keys = q.shape[1], k.shape[1]
    length = (keys - prefix) // responses if responses else 0
    prefix_queries = rows - responses * length
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    full_prefix = prefix_queries == prefix
    out = []
    if full_prefix:
        early = [x[:, :prefix] for x in (q, k, v)]
        out.append(_causal(attend, *early, visible=visible[:, :prefix]))
    if responses or not full_prefix:
        query = np.arange(prefix if full_prefix else prefix - prefix_queries, keys)
        mask = _causal_mask(query, keys, prefix, length) & visible[:, None]
        out.append(_masked(attend, q[:, prefix:] if full_prefix else q, k, v, mask))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def full_attention(
    q: Float[Array, "N S H E"],
    k: Float[Array, "N S H E"],
    v: Float[Array, "N S H E"],
    segments: Int[Array, "N S"] | None = None,
    longest: int | None = None,
    implementation: Implementation = "cudnn",
) -> Float[Array, "N S H E"]:
    """Bidirectional attention: every token attends to every token, or to those of its own segment (vision
    tower).

    segments: 1 and more; 0 at the end of a row for what only fills it, whose output means nothing. The
    kernels know lengths, not segments: where some row has two, XLA computes all rows. longest: as in
    `ops.attention`; XLA computes short segments.
    """
    if segments is None:
        return _bidirectional(q, k, v, jnp.full(len(q), q.shape[1], jnp.int32), implementation)
    if longest is not None:
        return xla.full_attention(q, k, v, segments, longest)
    lengths = jnp.maximum((segments == 1).sum(1, dtype=jnp.int32), 1)
    return jax.lax.cond(
        (segments <= 1).all(),
        lambda q, k, v: _bidirectional(q, k, v, lengths, implementation),
        lambda q, k, v: xla.full_attention(q, k, v, segments),
        *(q, k, v),
    )


def is_forward_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy: keep what the forward kernel gives, output and log-sum-exp."""
    return primitive.name == FORWARD


def _bidirectional(q, k, v, lengths: Int[Array, " N"], implementation) -> Float[Array, "N S H E"]:
    tokens = q.shape[1]
    q, k, v = (_pad(x, 2) for x in (q, k, v))
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    return attend(q, k, v, key_value_seq_lengths=lengths)[:, :tokens]


def _pad(x: Float[Array, "B s h E"], multiple: int) -> Float[Array, "B t h E"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _causal_mask(query: Int[np.ndarray, " q"], keys: int, prefix: int, length: int) -> Bool[Array, "1 q S"]:
    """Mask of the queries at these indices: the prefix and the query's own response, up to the query."""
    start = np.where(query < prefix, 0, query - (query - prefix) % max(length, 1))
    at, first = (jnp.asarray(x, jnp.int32)[None, :, None] for x in (query, start))
    key = jnp.arange(keys, dtype=jnp.int32)[None, None]
    return (key <= at) & ((key < prefix) | (key >= first))


def _causal(attend, q, k, v, visible: Bool[Array, "B P"]) -> Float[Array, "B P H E"]:
    """Self-attention of the prefix. Hidden keys and values become 0, which stops their gradients."""
    length = k.shape[1]
    count = visible.sum(1, dtype=jnp.int32)
    real = jnp.arange(length)[None] < count[:, None]
    k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    q, k, v = (_pad(x, 2) for x in (q, k, v))
    out = attend(q, k, v, is_causal=True, key_value_seq_lengths=jnp.maximum(count, 1))
    return jnp.where((count > 0)[:, None, None, None], out[:, :length], 0)


def _masked(attend, q, k, v, mask: Bool[Array, "B q S"]) -> Float[Array, "B q H E"]:
    rows, keys = mask.shape[1:]
    has_key = mask.any(-1)
    mask = jnp.pad(mask | ~has_key[:, :, None], ((0, 0), (0, -rows % TILE), (0, 0)), constant_values=True)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -keys % TILE)))[:, None]
    q, k, v = (_pad(x, TILE) for x in (q, k, v))
    lengths = jnp.full(len(k), k.shape[1], jnp.int32)
    out = attend(q, k, v, mask=mask, key_value_seq_lengths=lengths)[:, :rows]
    return jnp.where(has_key[:, :, None, None], out, 0)
