"""Attention by cuDNN's flash kernels (NVIDIA GPUs, 16-bit numbers), through `jax.nn.dot_product_attention`.

The kernels take lengths, causality from the first key on, or a bias of [queries, keys]. So a prompt group
goes in two calls: the prefix on itself is causal and has lengths; the responses' rows, which are few, see
all keys of the row through a bias of their own [K * R, S]. Nothing of [S, S] is held.

What these calls rely on, as read in JAX 0.10 (`jax/_src/cudnn/fused_attention_stablehlo.py`), in its tests
and in the kernels' own list of what they refuse:

- heads that share keys, a head size that is a multiple of 8 and at most 128; lengths with causality, and
  lengths with a mask. Numbers of queries and keys must be even to be differentiated, bias or not;
- a bias of [B, 1, queries, keys], whose gradient is computed whether it is wanted or not. For that the
  backward pass holds the scores' gradients of this call, 2 bytes for each of B * H * K * R * S;
- without lengths, some versions' backward pass gives NaN where the keys do not fill their tiles of 128. So
  lengths are always given, and what goes in with a bias is padded to whole tiles;
- a query that sees no key may give NaN. None is left: such a query is shown some keys, and its output is
  then set to 0;
- what comes out for keys after a row's length is not relied on, in the backward pass neither.

The functions work on local arrays: call them inside `shard_map` over rows and heads. `implementation="xla"`
runs the same calls on any platform, with the scores in memory: for tests.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

TILE = 128  # of queries and keys in the kernels

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

    As `mllm_align.ops.attention.prompt_group_attention`, but that causality is by place in the row, and
    that a query which sees no key gets zeros and gives no gradient. The queries are those of all S rows,
    or of the prefix's last rows followed by the responses.

    Where the whole prefix asks, its visible keys must be its first ones, without holes: only their number
    is used. Masked image embeddings (BDHS) are holes.
    """
    rows, keys = q.shape[1], k.shape[1]
    length = (keys - prefix) // responses if responses else 0
    prefix_queries = rows - responses * length
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    whole = prefix_queries == prefix
    out = []
    if whole:
        early = [x[:, :prefix] for x in (q, k, v)]
        out.append(_causal(attend, *early, visible=visible[:, :prefix]))
    if responses or not whole:
        place = np.arange(prefix if whole else prefix - prefix_queries, keys)
        mask = _may_see(place, keys, prefix, length) & visible[:, None]
        out.append(_masked(attend, q[:, prefix:] if whole else q, k, v, mask))
    return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def full_attention(
    q: Float[Array, "N S H E"],
    k: Float[Array, "N S H E"],
    v: Float[Array, "N S H E"],
    implementation: Implementation = "cudnn",
) -> Float[Array, "N S H E"]:
    """Every token sees every token (vision tower)."""
    tokens = q.shape[1]
    lengths = jnp.full(len(q), tokens, jnp.int32)
    q, k, v = (_pad(x, 2) for x in (q, k, v))
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    return attend(q, k, v, key_value_seq_lengths=lengths)[:, :tokens]


def _pad(x: Float[Array, "B s h E"], multiple: int) -> Float[Array, "B t h E"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _may_see(place: Int[np.ndarray, " q"], keys: int, prefix: int, length: int) -> Bool[Array, "1 q S"]:
    """Whether the query at a place may see a key: the prefix and its own response, up to itself."""
    start = np.where(place < prefix, 0, place - (place - prefix) % max(length, 1))
    query, first = (jnp.asarray(x, jnp.int32)[None, :, None] for x in (place, start))
    key = jnp.arange(keys, dtype=jnp.int32)[None, None]
    return (key <= query) & ((key < prefix) | (key >= first))


def _causal(attend, q, k, v, visible: Bool[Array, "B P"]) -> Float[Array, "B P H E"]:
    """The prefix on itself. Zeros stand in for hidden keys, so that their gradients are cut off too."""
    length = k.shape[1]
    count = visible.sum(1, dtype=jnp.int32)
    real = jnp.arange(length)[None] < count[:, None]
    k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    q, k, v = (_pad(x, 2) for x in (q, k, v))
    out = attend(q, k, v, is_causal=True, key_value_seq_lengths=jnp.maximum(count, 1))
    return jnp.where((count > 0)[:, None, None, None], out[:, :length], 0)


def _masked(attend, q, k, v, mask: Bool[Array, "B q S"]) -> Float[Array, "B q H E"]:
    rows, keys = mask.shape[1:]
    sees = mask.any(-1)
    mask = jnp.pad(mask | ~sees[:, :, None], ((0, 0), (0, -rows % TILE), (0, 0)), constant_values=True)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, -keys % TILE)))[:, None]
    q, k, v = (_pad(x, TILE) for x in (q, k, v))
    lengths = jnp.full(len(k), k.shape[1], jnp.int32)
    out = attend(q, k, v, mask=mask, key_value_seq_lengths=lengths)[:, :rows]
    return jnp.where(sees[:, :, None, None], out, 0)
