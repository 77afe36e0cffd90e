"""Attention as the modules call it: the backend that fits, on each device's own rows and heads.

TPU, heads of 64 to 128, or 256      splash (Pallas); those between both filled with zeros
NVIDIA, 16 bits, heads of 8 to 128   cuDNN flash attention; not where a prefix has keys that nobody
                                     sees between others, a row has several segments, images see
                                     themselves or there is a window, which it can't say, nor under XLA's
                                     flags for deterministic operations, with which it fails at the first
                                     step (JAX 0.11.2, cuDNN 9.19)
elsewhere                            XLA, the definition
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mllm_align.ops import attention as xla
from mllm_align.ops import cudnn, splash
from mllm_align.sharding import current, per_shard, platform, tensor_shards

DETERMINISTIC = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")
SCORES, QUERIES = 2**20, 256
"""At a time on a CPU, 4 MiB in float32, of a block of so many queries."""
ROW, HEADS = ("rows", None), ("rows", None, "heads", None)


def backend(q: Any, special: bool = False) -> Any:
    """The module whose functions to call for queries [..., E] on the platform that is traced for. special:
    keys that a query sees are not simply the first ones."""
    name, size = platform(), q.shape[-1]
    if name == "tpu" and (64 <= size <= 128 or size == 256):
        return splash
    fits = q.dtype.itemsize == 2 and size % 8 == 0 and size <= 128 and not special
    if name in ("gpu", "cuda") and fits and not deterministic():
        return cudnn
    return xla


def deterministic() -> bool:
    """Whether XLA_FLAGS ask for deterministic operations."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return any(
        flag in (f"--{name}", f"--{name}=true", f"--{name}=1") for flag in flags for name in DETERMINISTIC
    )


def few_rows(module: Any, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same attention of q [N, S, H, E], k and more. Where XLA computes it on a CPU, no more rows at a
    time than have `SCORES` in a block of queries: those stay in the processor's caches, which makes long
    rows up to three times as fast."""
    if module is not xla or platform() != "cpu":
        return attend

    def run(q: jax.Array, k: jax.Array, *more: jax.Array) -> jax.Array:
        size, most = len(q), SCORES // (q.shape[2] * min(q.shape[1], QUERIES) * k.shape[1])
        rows = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(most, 1))
        if rows == size:
            return attend(q, k, *more)
        parts = [x.reshape(-1, rows, *x.shape[1:]) for x in (q, k, *more)]
        return jax.lax.map(lambda part: attend(*part), parts).reshape(q.shape)

    return run


def full_attention(
    q: Float[Array, "N S H E"],
    k: Float[Array, "N S H E"],
    v: Float[Array, "N S H E"],
    segments: Int[Array, "N S"] | None = None,
    longest: int | None = None,
) -> Float[Array, "N S H E"]:
    """Every token sees every token, or those of its own segment (vision tower); see `ops.attention` and
    `ops.cudnn`. longest: tokens of the longest segment, where segments are short."""
    heads, module = ("rows", None, "vision_heads", None), backend(q)
    arrays, attend = (q, k, v), module.full_attention
    if segments is not None:
        arrays, attend = (*arrays, segments), partial(attend, longest=longest)
    return per_shard(few_rows(module, attend), (heads,) * 3 + (ROW,) * (len(arrays) - 3))(*arrays)


def prompt_group_attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B S G E"],
    v: Float[Array, "B S G E"],
    query_order: Int[Array, "B Q"],
    order: Int[Array, "B S"],
    visible: Bool[Array, "B S"],
    prefix: int,
    responses: int,
    holes: bool = False,
    *,
    block: int = 0,
    window: int | None = None,
    places: tuple[Int[Array, "B Q"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B Q H E"]:
    """Attention over rows [prefix | response 1 | ... | response K]; see `ops.attention`.

    holes: some prefix has a key that nobody sees between others. block: the most neighbours that see each
    other, 0 for none. Without blocks order rises along the prefix and along each response, so the kernels
    take causality from the index.
    """
    by_order = bool(block or window)  # and not by index
    module = backend(q, holes or by_order)
    k, v = shared_heads(q, k), shared_heads(q, v)
    sizes, ranges = (prefix, responses), {"ahead": max(block, 1), "window": window}

    def ordered(q, k, v, query_order, order, visible, *places):
        if module is xla:
            arrays = q, k, v, query_order, order, visible
            return xla.prompt_group_attention(*arrays, *sizes, **ranges, places=places or None)
        data = {"orders": (query_order, order), "places": places or None}
        return module.prompt_group_attention(q, k, v, visible, *sizes, **ranges, **data)

    if module is xla or by_order:
        arrays = (q, k, v, query_order, order, visible, *(places if window and places else ()))
        attend = few_rows(module, ordered)
        return per_shard(attend, (HEADS,) * 3 + (ROW,) * (len(arrays) - 3))(*arrays)
    attend = partial(module.prompt_group_attention, prefix=prefix, responses=responses)
    return per_shard(attend, (HEADS, HEADS, HEADS, ROW))(q, k, v, visible)


def fork_attention(
    q: Float[Array, "B F H E"],
    prefix: Any,
    own: Any,
    seen: Bool[Array, "B F P"],
    reach: Int[Array, " B"],
    column: Int[Array, ""],
) -> Float[Array, "B F H E"]:
    """One token of each of F forks; see `ops.attention`."""
    prefix = tuple(shared_heads(q, x, 1) for x in prefix)
    own = tuple(shared_heads(q, x, 2) for x in own)
    cache, kept = ("rows", "heads", None, None), ("rows", None, "heads", None, None)

    def attend(q, prefix_k, prefix_v, own_k, own_v, *rest):
        return xla.fork_attention(q, (prefix_k, prefix_v), (own_k, own_v), *rest)

    names = (HEADS, cache, cache, kept, kept, ("rows", None, None), ("rows",), ())
    return per_shard(attend, names)(q, *prefix, *own, seen, reach, column)


def shared_heads(q: jax.Array, kept: jax.Array, axis: int = 2) -> jax.Array:
    """Keys or values with as many heads as can be cut like those of q [.., H, E].

    Where there are fewer key-value heads than devices that share the heads, each device gets a copy of
    the one that its queries use.
    """
    mesh = current()
    shards = 1 if mesh is None else tensor_shards(mesh)
    if kept.shape[axis] % shards == 0 or q.shape[2] % shards:
        return kept
    repeats = shards // math.gcd(kept.shape[axis], shards)
    return jnp.repeat(kept, repeats, axis=axis)
