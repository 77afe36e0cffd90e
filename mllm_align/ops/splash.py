"""Attention by JAX's Pallas "splash" kernels for TPUs, over prompt groups and over image patches.

Which keys a query may see is a rule that the kernels evaluate block by block; blocks in which nobody sees
anything are never visited: those above the diagonal and those between siblings. Which keys are visible at
all is data, and goes in as segment ids. So neither the host nor the device holds a [S, S] array.

The functions work on local arrays: call them inside `shard_map` over rows and heads, with
`check_vma=False`. In 16 bits the kernels compile at JAX's default matmul precision only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int

LANES = 128  # what the kernels' blocks of keys must be a multiple of
LARGEST = 768  # side of the largest block of scores; in bfloat16 that needs 8 of a kernel's 16 MiB of VMEM
STEP = 256**2  # what starting a block costs, as an area of scores: an assumption, not measured


def prompt_group_attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B S G E"],
    v: Float[Array, "B S G E"],
    visible: Bool[Array, "B S"],
    prefix: int,
    responses: int,
    interpret: bool = False,
) -> Float[Array, "B Q H E"]:
    """Causal attention over rows laid out as [prefix | response 1 | ... | response K].

    As `mllm_align.ops.attention.prompt_group_attention`, but that causality is by place in the row, and
    that a query which sees no key gets zeros and gives no gradient. The queries are those of all S rows,
    or of the prefix's last rows followed by the responses. Keys and values are not repeated for the
    H / G heads that share them. `interpret` runs the kernels on any platform, slowly.
    """
    rows, keys = q.shape[1], k.shape[1]
    length = (keys - prefix) // responses if responses else 0
    prefix_queries = rows - responses * length
    mask = PromptGroupMask(prefix, responses, length, prefix_queries, _blocks(rows)[1], _blocks(keys)[1])
    sees = _sees_a_key(visible, prefix, responses)[:, prefix - prefix_queries :]
    out = _attend(q, k, v, visible, mask, interpret)
    # A row that sees no key would else pass its gradient to all keys of its blocks, unweighted.
    return jnp.where(sees[:, :, None, None], out, 0)


def full_attention(
    q: Float[Array, "N S H E"],
    k: Float[Array, "N S H E"],
    v: Float[Array, "N S H E"],
    interpret: bool = False,
) -> Float[Array, "N S H E"]:
    """Every token sees every token (vision tower)."""
    padded = _blocks(q.shape[1])[1]
    return _attend(q, k, v, jnp.ones(q.shape[:2], bool), masks.FullMask((padded, padded)), interpret)


@dataclass(frozen=True)
class _Rule:
    """Whether a query sees a key, for arrays of places that broadcast. Equal rules share a trace.

    A query comes as its place, or with siblings as `place + (start of its response << 16)`.
    """

    prefix: int
    siblings: bool

    def __call__(self, query, key):
        if not self.siblings:
            return key <= query
        return (key <= (query & 0xFFFF)) & ((key < self.prefix) | (key >= (query >> 16)))


@dataclass(frozen=True)
class PromptGroupMask(masks.Mask):
    """Who may see whom in a row, `queries` x `keys` after padding.

    A mask with `q_sequence` and `mask_function` is computed within the kernels. Padded queries stand at
    the last place, so that no row of the mask is empty: that would divide by zero.
    """

    prefix: int
    responses: int
    length: int
    prefix_queries: int
    queries: int
    keys: int

    def __post_init__(self):
        if self.keys > 2**15:
            raise ValueError(f"a row of {self.keys} places does not fit the rule's 16 bits")

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries, self.keys

    @property
    def mask_function(self) -> _Rule:
        return _Rule(self.prefix, self.responses > 1)

    @property
    def q_sequence(self) -> Int[np.ndarray, " Q"]:
        end = self.prefix + self.responses * self.length
        place = np.arange(self.prefix - self.prefix_queries, end, dtype=np.int32)
        place = np.pad(place, (0, self.queries - len(place)), mode="edge")
        if self.responses < 2:
            return place
        start = np.where(place < self.prefix, 0, place - (place - self.prefix) % self.length)
        return place + (start << 16).astype(np.int32)

    def __getitem__(self, index) -> Bool[np.ndarray, "q k"]:
        queries, keys = self.q_sequence[index[0]], np.arange(self.keys)[index[1]]
        return self.mask_function(queries[:, None], keys[None])


def _sees_a_key(visible: Bool[Array, "B S"], prefix: int, responses: int) -> Bool[Array, "B S"]:
    def since_first(x):
        at = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        return (at >= x.argmax(-1, keepdims=True)) & x.any(-1, keepdims=True)

    early = since_first(visible[:, :prefix])
    if not responses:
        return early
    own = since_first(visible[:, prefix:].reshape(len(visible), responses, -1)) | early[:, None, -1:]
    return jnp.concatenate([early, own.reshape(len(visible), -1)], axis=1)


def _blocks(length: int) -> tuple[int, int]:
    """(size of a block, padded length) for which the lower triangle of blocks costs least.

    A block costs its area and STEP for being visited at all.
    """
    counts = {size: -(-length // size) for size in range(LANES, LARGEST + 1, LANES)}
    size = min(counts, key=lambda size: counts[size] * (counts[size] + 1) * (size**2 + STEP))
    return size, counts[size] * size


def scores(prefix: int, responses: int, length: int) -> int:
    """How many scores the kernels compute for one head of one row [prefix | K responses of `length`].

    XLA's cost analysis sees none of it: these custom calls carry no estimate. A score costs 4 E FLOPs
    forward (two products) and 14 E backward (seven: the scores and their gradients are computed in both
    backward kernels). Each step over a block of queries reads a block of keys and one of values.
    """
    rows = prefix + responses * length
    size, total = _blocks(rows)
    mask = PromptGroupMask(prefix, responses, length, prefix, total, total)
    cut = [slice(at, at + size) for at in range(0, total, size)]
    return size**2 * sum(bool(mask[queries, keys].any()) for queries in cut for keys in cut)


def _attend(q, k, v, visible, mask: masks.Mask, interpret: bool):
    rows, keys = q.shape[1], k.shape[1]
    (of_q, total_q), (of_k, total_k) = _blocks(rows), _blocks(keys)
    sizes = kernels.BlockSizes(
        block_q=of_q,
        block_kv=of_k,
        block_q_dkv=of_q,
        block_kv_dkv=of_k,
        block_q_dq=of_q,
        block_kv_dq=of_k,
    )
    kernel: Any = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def laid_out(x, total):  # [B, heads, padded length, E]
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, total - x.shape[1]), (0, 0)))

    seen = jnp.pad(visible.astype(jnp.int32), ((0, 0), (0, total_k - keys)))
    segments = kernels.SegmentIds(jnp.ones((len(q), total_q), jnp.int32), seen)
    q = laid_out(q * q.shape[-1] ** -0.5, total_q)
    out = jax.vmap(kernel)(q, laid_out(k, total_k), laid_out(v, total_k), segments)
    return out[:, :, :rows].swapaxes(1, 2)
