"""Attention by JAX's Pallas "splash" kernels for TPUs, over prompt groups and over image patches.

The kernels evaluate the mask as a function, block by block, and skip empty blocks: those above the diagonal
and those between two responses. Which keys are visible is data, and is passed as segment ids. Neither the
host nor the device ever allocates an [S, S] array. Where images see themselves, or queries a window, each
query's last and first key are data, too.

The functions work on local arrays: call them inside `shard_map` over rows and heads, with
`check_vma=False`. For 16-bit inputs the kernels compile only at JAX's default matmul precision.
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

LANES = 128  # the kernels' block sizes must be multiples of this
MAX_BLOCK = 768  # side of the largest block of scores; in bfloat16 it takes 8 of a kernel's 16 MiB of VMEM
WIDE_BLOCK = 384  # the same for heads of more than LANES
STEP = 256**2  # cost of starting a block, in scores: an assumption, not measured


def prompt_group_attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B S G E"],
    v: Float[Array, "B S G E"],
    visible: Bool[Array, "B S"],
    prefix: int,
    responses: int,
    interpret: bool = False,
    *,
    ahead: int = 1,
    window: int | None = None,
    orders: tuple[Int[Array, "B Q"], Int[Array, "B S"]] | None = None,
    places: tuple[Int[Array, "B Q"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B Q H E"]:
    """Attention over rows laid out as [prefix | response 1 | ... | response K].

    Like `mllm_align.ops.attention.prompt_group_attention`, except that causality follows the index in the
    row, and that a query without a visible key gives zeros and no gradient. The queries are those of all S
    rows, or of the prefix's last rows followed by the responses. Keys and values are not repeated for the
    H / G heads that share them. `interpret` runs the kernels on any platform, slowly.

    ahead, window, orders, places: as there, orders of queries and of keys. With them, a single query of the
    prefix may be any of its rows.
    """
    rows, keys = q.shape[1], k.shape[1]
    length = (keys - prefix) // responses if responses else 0
    prefix_queries = rows - responses * length
    total_q, total_k = (_blocks(each, width=q.shape[-1])[1] for each in (rows, keys))
    mask = PromptGroupMask(prefix, responses, length, prefix_queries, total_q, total_k, ahead, window)
    if orders is None:
        has_key = _has_visible_key(visible, prefix, responses)[:, prefix - prefix_queries :]
        out = _attend(q, k, v, visible, mask, interpret)
    else:
        last, first = _reach(mask, orders, places)
        has_key = _reaches_visible_key(mask, visible, last, first)
        out = _attend(q, k, v, visible, mask, interpret, sequence=mask.numbers(last, first))
    # A query without a visible key would pass its gradient unweighted to all keys of its blocks.
    return jnp.where(has_key[:, :, None, None], out, 0)


def full_attention(
    q: Float[Array, "N S H E"],
    k: Float[Array, "N S H E"],
    v: Float[Array, "N S H E"],
    segments: Int[Array, "N S"] | None = None,
    longest: int | None = None,
    interpret: bool = False,
) -> Float[Array, "N S H E"]:
    """Bidirectional attention: every token attends to every token, or to those of its own segment, 0 or
    more (vision tower). longest: as in `ops.attention`; blocks of keys further away are skipped."""
    padded = _blocks(q.shape[1], longest, q.shape[-1])[1]
    mask: masks.Mask = masks.FullMask((padded, padded))
    if segments is None:
        return _attend(q, k, v, jnp.ones(q.shape[:2], bool), mask, interpret)
    if longest is not None:
        mask = masks.LocalMask((padded, padded), (longest - 1, longest - 1), 0)
    return _attend(q, k, v, segments + 1, mask, interpret, segments + 1, longest)


@dataclass(frozen=True)
class _Rule:
    """Whether a query attends to a key, for broadcastable arrays of indices. Equal rules share a trace.

    A query is given by its index in the row; with several responses, by
    `index + (start of its response << 16)`.
    """

    prefix: int
    several: bool

    def __call__(self, query, key):
        if not self.several:
            return key <= query
        return (key <= (query & 0xFFFF)) & ((key < self.prefix) | (key >= (query >> 16)))


@dataclass(frozen=True)
class _WindowRule:
    """As `_Rule`. A query is given by `last key + (first key << 15)`, the first one of the prefix."""

    prefix: int
    responses: int
    length: int
    window: int

    def __call__(self, query, key):
        last, first = query & 0x7FFF, query >> 15
        own = key > last - self.window  # of a response
        for response in range(1, self.responses):
            start = self.prefix + response * self.length
            own = own & ((key >= start) | (last < start))
        return (key <= last) & (key >= first) & ((key < self.prefix) | own)


@dataclass(frozen=True)
class PromptGroupMask(masks.Mask):
    """The attention mask of a row, `queries` x `keys` after padding.

    The kernels themselves compute a mask that has `q_sequence` and `mask_function`. Padded queries get the
    index of the last one, so that no row of the mask is empty: an empty row would divide by zero.

    With `ahead` or a window it is what any row may need, and each row's own numbers replace `q_sequence`.
    """

    prefix: int
    responses: int
    length: int
    prefix_queries: int
    queries: int
    keys: int
    ahead: int = 1
    window: int | None = None

    def __post_init__(self):
        if self.keys > 2**15:
            raise ValueError(f"a row of {self.keys} tokens exceeds the mask's 16-bit indices")

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries, self.keys

    @property
    def mask_function(self) -> _Rule | _WindowRule:
        if self.window is not None:
            return _WindowRule(self.prefix, self.responses, self.length, self.window)
        return _Rule(self.prefix, self.responses > 1)

    @property
    def index(self) -> Int[np.ndarray, " q"]:
        """Of the queries in the row, before padding."""
        end = self.prefix + self.responses * self.length
        return np.arange(self.prefix - self.prefix_queries, end, dtype=np.int32)

    def numbers(self, last: Any, first: Any = 0) -> Any:
        """What the rule gets for queries whose keys end at `last` and, of the prefix, begin at `first`."""
        if self.window is not None:
            return last + (first << 15)
        if self.responses < 2:
            return last
        index = self.index
        start = np.where(index < self.prefix, 0, index - (index - self.prefix) % self.length)
        return last + (start << 16).astype(np.int32).reshape((1,) * (last.ndim - 1) + (-1,))

    @property
    def q_sequence(self) -> Int[np.ndarray, " Q"]:
        index, first = self.index, 0
        last = np.where(index < self.prefix, np.minimum(index + self.ahead, self.prefix) - 1, index)
        if self.window is not None and self.prefix_queries == self.prefix:
            first = np.where(index < self.prefix, np.maximum(index - self.window + 1, 0), 0)
        numbers = self.numbers(last, first).astype(np.int32)
        return np.pad(numbers, (0, self.queries - len(index)), mode="edge")

    def __getitem__(self, index) -> Bool[np.ndarray, "q k"]:
        queries, keys = self.q_sequence[index[0]], np.arange(self.keys)[index[1]]
        return self.mask_function(queries[:, None], keys[None])


def _has_visible_key(visible: Bool[Array, "B S"], prefix: int, responses: int) -> Bool[Array, "B S"]:
    """Whether each query of a row attends to at least one visible key."""

    def since_first(x):
        at = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        return (at >= x.argmax(-1, keepdims=True)) & x.any(-1, keepdims=True)

    early = since_first(visible[:, :prefix])
    if not responses:
        return early
    own = since_first(visible[:, prefix:].reshape(len(visible), responses, -1)) | early[:, None, -1:]
    return jnp.concatenate([early, own.reshape(len(visible), -1)], axis=1)


def _reach(mask: PromptGroupMask, orders: Any, places: Any) -> tuple[Any, Any]:
    """(last key, first key of the prefix) [B, Q] of each query. Padding has the order of what is before."""
    of_queries, order = orders
    prefix, asking = mask.prefix, mask.prefix_queries
    order = jax.lax.cummax(order[:, None, :prefix], axis=2)
    last = (order <= of_queries[:, :asking, None]).sum(-1, dtype=jnp.int32) - 1
    own = jnp.broadcast_to(jnp.asarray(mask.index[asking:]), (len(order), mask.index.size - asking))
    last = jnp.concatenate([jnp.maximum(last, 0), own], axis=1)
    if mask.window is None:
        return last, jnp.zeros_like(last)
    of_queries, place = places
    place = jax.lax.cummax(place[:, None, :prefix], axis=2)
    return last, (place <= of_queries[:, :, None] - mask.window).sum(-1, dtype=jnp.int32)


def _reaches_visible_key(mask: PromptGroupMask, visible, last, first) -> Bool[Array, "B Q"]:
    """Whether each query attends to at least one visible key; last, first: of `_reach`."""

    def upto(x):  # visible ones before each index
        return jnp.pad(jnp.cumsum(x, axis=-1, dtype=jnp.int32), (*[(0, 0)] * (x.ndim - 1), (1, 0)))

    early = upto(visible[:, : mask.prefix])
    stop = jnp.minimum(last + 1, mask.prefix)
    found = jnp.take_along_axis(early, stop, 1) > jnp.take_along_axis(early, jnp.minimum(first, stop), 1)
    if not mask.responses:
        return found
    own = upto(visible[:, mask.prefix :].reshape(len(visible), mask.responses, -1))
    at = np.arange(mask.length)
    begin = np.maximum(at + 1 - (mask.window or mask.length), 0)
    own = (own[:, :, at + 1] > own[:, :, begin]).reshape(len(visible), -1)
    asking = mask.prefix_queries
    return jnp.concatenate([found[:, :asking], found[:, asking:] | own], axis=1)


def _blocks(length: int, reach: int | None = None, width: int = LANES) -> tuple[int, int]:
    """(block size, padded length) with the cheapest lower triangle of blocks; with the cheapest band of
    blocks, where queries see no further than `reach`. width: E.

    The cost of a block is its area plus STEP.
    """
    most = MAX_BLOCK if width <= LANES else min(MAX_BLOCK, WIDE_BLOCK)
    counts = {size: -(-length // size) for size in range(LANES, most + 1, LANES)}

    def cost(size: int) -> int:
        beside = counts[size] + 1 if reach is None else 2 * min(1 + 2 * -(-reach // size), counts[size])
        return counts[size] * beside * (size**2 + STEP)

    size = min(counts, key=cost)
    return size, counts[size] * size


def scores(prefix: int, responses: int, length: int) -> int:
    """Number of scores that the kernels compute for one head of one row [prefix | K responses of `length`].

    XLA's cost analysis does not count them: these custom calls carry no estimate. A score costs 4 E FLOPs
    forward (two products) and 14 E backward (seven: both backward kernels compute the scores and their
    gradients). Each step over a block of queries reads a block of keys and a block of values.
    """
    rows = prefix + responses * length
    size, total = _blocks(rows)
    mask = PromptGroupMask(prefix, responses, length, prefix, total, total)
    cut = [slice(at, at + size) for at in range(0, total, size)]
    return size**2 * sum(bool(mask[queries, keys].any()) for queries in cut for keys in cut)


def _attend(
    q,
    k,
    v,
    visible,
    mask: masks.Mask,
    interpret: bool,
    of_queries=None,
    reach: int | None = None,
    sequence=None,
):
    """visible: of keys. of_queries: a query attends to keys whose `visible` is the same number; default, to
    all whose it is 1. reach: as in `_blocks`. sequence [B, Q]: numbers for the mask's rule, in place of its
    own."""
    rows, keys, size = q.shape[1], k.shape[1], q.shape[-1]
    (of_q, total_q), (of_k, total_k) = (_blocks(each, reach, size) for each in (rows, keys))
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

    width = LANES if 64 < size < LANES else size  # zeros change no score

    def laid_out(x, total):  # [B, heads, padded length, padded E]
        padding = (0, 0), (0, 0), (0, total - x.shape[1]), (0, width - size)
        return jnp.pad(x.swapaxes(1, 2), padding)

    seen = jnp.pad(visible.astype(jnp.int32), ((0, 0), (0, total_k - keys)))
    asking = jnp.ones((len(q), total_q), jnp.int32)
    if of_queries is not None:  # those that fill the last block attend to the keys that do
        asking = jnp.pad(of_queries, ((0, 0), (0, total_q - rows)))
    segments = kernels.SegmentIds(asking, seen)
    q = laid_out(q * size**-0.5, total_q)
    arrays = q, laid_out(k, total_k), laid_out(v, total_k), segments
    out: Any
    if sequence is None:
        out = jax.vmap(kernel)(*arrays)
    else:
        sequence = jnp.pad(sequence, ((0, 0), (0, total_q - rows)), mode="edge")

        def of_row(numbers, *arrays):
            infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
            own = (info._replace(q_sequence=numbers) for info in infos)
            return kernels.SplashAttentionKernel(*own, **kernel.kwargs)(*arrays)

        out = jax.vmap(of_row)(sequence, *arrays)
    return out[:, :, :rows, :size].swapaxes(1, 2)
