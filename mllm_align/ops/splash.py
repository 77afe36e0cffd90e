"""Attention by JAX's Pallas "splash" kernels for TPUs, over prompt groups and over image patches.

The kernels evaluate the mask as a function, block by block, and skip empty blocks: those above the diagonal
and those between two responses. Which keys are visible is data, and is passed as segment ids. Neither the
host nor the device ever allocates an [S, S] array. Where images see themselves, or queries a window, each
query's last and first key are data, too.

The functions work on local arrays: call them inside `shard_map` over rows and heads, with
`check_vma=False`. For 16-bit inputs the kernels compile only at JAX's default matmul precision.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int

from mllm_align.ops.splash_mask import PromptGroupMask, has_visible_key, has_visible_key_in, key_range

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
        has_key = has_visible_key(visible, prefix, responses)[:, prefix - prefix_queries :]
        out = _attend(q, k, v, visible, mask, interpret)
    else:
        last, first = key_range(mask, orders, places)
        has_key = has_visible_key_in(mask, visible, last, first)
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
        residual_checkpoint_name="attention",
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
