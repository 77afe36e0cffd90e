"""Attention in plain XLA: the reference implementation that every faster backend is tested against.

The score array [queries, keys] of a whole sequence is never materialized: queries are processed in small
blocks, and the backward pass recomputes each block's scores from the saved log-sum-exp (Dao et al. 2022).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row with no visible key gives no NaN

_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


def full_attention(
    q: Float[Array, "N S H E"],
    k: Float[Array, "N S H E"],
    v: Float[Array, "N S H E"],
    segments: Int[Array, "N S"] | None = None,
    longest: int | None = None,
    block: int = 256,
) -> Float[Array, "N S H E"]:
    """Bidirectional attention: every token attends to every token, or to those of its own segment, 0 or
    more (vision tower). Softmax in float32.

    longest: no segment is longer, and the tokens of each follow each other. Only scores of keys that near
    are then computed.
    """
    if segments is not None and longest is not None and longest < q.shape[1]:
        return _short_segments(q, k, v, segments, longest)
    order = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments
    q = (q * q.shape[-1] ** -0.5)[:, :, :, None]
    visible, equal = jnp.ones(order.shape, bool), segments is not None
    return _blocked(q, k.swapaxes(1, 2), v.swapaxes(1, 2), (order,), (order, visible), block, equal)


def _short_segments(q, k, v, segments, size: int) -> Float[Array, "N S H E"]:
    """Rows cut into blocks of `size` queries, each with the keys of its own block and the two beside it."""
    rows, length = segments.shape
    count = -(-length // size)

    def blocks(x, around: int, fill: int = 0):
        """[N, S, ...] -> [N * count, (1 + 2 * around) * size, ...]."""
        end = (around + count) * size - length
        x = jnp.pad(x, ((0, 0), (around * size, end), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        x = x.reshape(rows, count + 2 * around, size, *x.shape[2:])
        beside = [x[:, i : i + count] for i in range(1 + 2 * around)]
        return jnp.concatenate(beside, axis=2).reshape(rows * count, -1, *x.shape[3:])

    q = blocks(q * q.shape[-1] ** -0.5, 0)[:, :, :, None]
    k, v = (blocks(x, 1).swapaxes(1, 2) for x in (k, v))
    order, of_keys = blocks(segments, 0, -1), blocks(segments, 1, -1)
    known = of_keys, jnp.ones(of_keys.shape, bool)
    out = _blocked(q, k, v, (order,), known, size, equal=True)
    return out.reshape(rows, count * size, *out.shape[2:])[:, :length]


def prompt_group_attention(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B S G E"],
    v: Float[Array, "B S G E"],
    query_order: Int[Array, "B Q"],
    order: Int[Array, "B S"],
    visible: Bool[Array, "B S"],
    prefix: int,
    responses: int,
    span: int = 384,
    block: int = 128,
    *,
    ahead: int = 1,
    window: int | None = None,
    places: tuple[Int[Array, "B Q"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B Q H E"]:
    """Attention over rows laid out as [prefix | response 1 | ... | response K].

    The prefix attends to itself; each response attends to the prefix and to itself, never to another
    response. The result equals that of K separate rows, with the prefix computed once. A query attends to a
    key if the key's order <= the query's order; order never falls along the prefix or a response. No more
    than `ahead` tokens, neighbours, have the same. `visible` is False for keys that no query attends to. A
    query without a visible key gets the mean of the values, never NaN.

    window: a query attends to no key whose place is `window` or more before its own. places: of queries and
    of keys; they rise along the prefix and along each response, by 1 or more.

    The queries are those of all S rows, or of some rows of the prefix followed by the responses. They are
    split into spans; if all prefix rows are queries, the matrix products of a span omit the keys after it
    and those before its window, which saves half of the prefix's work. Within a span, `block` queries are
    scored at a time.
    """
    heads, groups, dim = q.shape[2], k.shape[2], q.shape[3]
    batch, total = q.shape[:2]
    length = (k.shape[1] - prefix) // responses if responses else 0
    prefix_queries = total - responses * length
    q = (q * dim**-0.5).reshape(batch, total, groups, heads // groups, dim)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def of_span(start: int, stop: int, parts: list[tuple[int, int]]) -> Float[Array, "B s H E"]:
        """Attention of the queries [start, stop) to the keys in the ranges `parts`."""

        def keys(x, axis):
            cut = [jax.lax.slice_in_dim(x, a, b, axis=axis) for a, b in parts]
            return cut[0] if len(cut) == 1 else jnp.concatenate(cut, axis=axis)

        own_keys = keys(k, 2), keys(v, 2)
        asking, known = (query_order[:, start:stop],), (keys(order, 1), keys(visible, 1))
        if window is not None:
            assert places is not None
            asking = *asking, places[0][:, start:stop] - window
            known = *known, keys(places[1], 1)
        return _blocked(q[:, start:stop], *own_keys, asking, known, block)

    spans = []
    for start in range(0, prefix_queries, span):
        stop = min(start + span, prefix_queries)
        first, last = 0, prefix
        if prefix_queries == prefix:
            first = 0 if window is None else max(start - window + 1, 0)
            last = min(stop + ahead - 1, prefix)
        spans.append((start, stop, [(first, last)]))
    for response in range(responses):
        own, end = prefix + response * length, prefix + (response + 1) * length
        for start in range(own, end, span):
            stop = min(start + span, end)
            shift = prefix_queries - prefix  # from a row's index among the keys to that among the queries
            spans.append((start + shift, stop + shift, [(0, prefix), (own, stop)]))
    return jnp.concatenate([of_span(*each) for each in spans], axis=1)


def fork_attention(
    q: Float[Array, "B F H E"],
    prefix: tuple[Float[Array, "B G P E"], Float[Array, "B G P E"]],
    own: tuple[Float[Array, "B F G R E"], Float[Array, "B F G R E"]],
    seen: Bool[Array, "B F P"],
    reach: Int[Array, " B"],
    column: Int[Array, ""],
) -> Float[Array, "B F H E"]:
    """Attention of one token of each of F forks to the prefix, where `seen` is True, to the fork's own key
    at `column` and to the `reach` keys before that, cyclically. One softmax over all; the prefix's keys are
    read once for all forks.
    """
    batch, forks, heads, dim = q.shape
    groups = own[0].shape[2]
    q = (q * dim**-0.5).reshape(batch, forks, groups, heads // groups, dim)
    age = (column - jnp.arange(own[0].shape[3])) % own[0].shape[3]
    written = (age[None] <= reach[:, None])[:, None, None, None]

    def on_prefix(x, product, cached):  # batch axes first: XLA's CPU backend has no other 16-bit product
        x = x.swapaxes(1, 2).reshape(batch, groups, -1, x.shape[-1])
        out = _einsum(product, x, cached)
        return out.reshape(batch, groups, forks, -1, out.shape[-1]).swapaxes(1, 2)

    # Two parts of one softmax, put together by their maxima and sums: a concatenation of the scores would
    # be written and read again, which took a GPU a quarter of a token's time.
    early = jnp.where(seen[:, :, None, None], on_prefix(q, "bgqe,bgpe->bgqp", prefix[0]), MASKED)
    late = jnp.where(written, _einsum("bfgme,bfgre->bfgmr", q, own[0]), MASKED)
    largest = jnp.maximum(early.max(-1, keepdims=True), late.max(-1, keepdims=True))
    early, late = jnp.exp(early - largest), jnp.exp(late - largest)
    total = early.sum(-1, keepdims=True) + late.sum(-1, keepdims=True)
    out = on_prefix(early.astype(q.dtype), "bgqp,bgpe->bgqe", prefix[1])
    out += _einsum("bfgmr,bfgre->bfgme", late.astype(q.dtype), own[1])
    return (out / total).reshape(batch, forks, heads, dim).astype(q.dtype)


def _blocked(q, k, v, asking, known, block, equal=False):
    """Attention of queries [B, S, G, m, E], `block` at a time, to keys and values [B, G, k, E]. asking,
    known: as in `_mask`, with rows [B, S] and [B, k]."""
    batch, length, groups, shared, dim = q.shape
    count = -(-length // block)
    size = -(-length // count)  # equal blocks need the least padding
    extra = count * size - length
    q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0), (0, 0)))
    asking = [jnp.pad(x, ((0, 0), (0, extra))) for x in asking]
    # [blocks, B, G, shared heads * size, E]: batch axes first, so that matrix products need no transposes
    q = q.reshape(batch, count, size, groups, shared, dim).transpose(1, 0, 3, 4, 2, 5)
    asking = tuple(x.reshape(batch, count, size).swapaxes(0, 1) for x in asking)
    out: Any = _attend(q.reshape(count, batch, groups, -1, dim), k, v, asking, known, equal)
    out = out.reshape(count, batch, groups, shared, size, dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(batch, count * size, groups * shared, dim)[:, :length]


def _mask(asking, known, equal) -> Bool[Array, "B s k"]:
    """Which keys count for which queries. asking: orders of queries, and with windows the last place that
    each no longer sees. known: orders of keys, whether they are visible, and with windows their places.
    equal: a query sees keys of its own order, not those before it, too."""
    (query_order, *passed), (order, visible, *place) = asking, known
    mask = (jnp.equal if equal else jnp.less_equal)(order[:, None, :], query_order[:, :, None])
    mask = mask & visible[:, None, :]
    return mask & (place[0][:, None, :] > passed[0][:, :, None]) if place else mask


def _scores(q, k, asking, known, equal):
    """Scores [B, G, m * s, k], float32; MASKED where a key does not count."""
    scores = _einsum("bgqe,bgke->bgqk", q, k)
    mask, shape = _mask(asking, known, equal), scores.shape
    scores = scores.reshape(*shape[:2], -1, mask.shape[1], shape[3])
    return jnp.where(mask[:, None, None], scores, MASKED).reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: Float[Array, "n B G Q E"],
    k: Float[Array, "B G k E"],
    v: Float[Array, "B G k E"],
    asking: tuple[Int[Array, "n B s"], ...],
    known: tuple[Array, ...],
    equal: bool,
) -> Float[Array, "n B G Q E"]:
    """Softmax attention of n query blocks to the same keys; Q = shared heads * s. asking, known: as in
    `_mask`."""
    return _attend_forward(q, k, v, asking, known, equal)[0]


def _attend_forward(q, k, v, asking, known, equal):
    def of_block(_, block):
        queries, of_queries = block
        scores = _scores(queries, k, of_queries, known, equal)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        out = _einsum("bgqk,bgke->bgqe", weights.astype(v.dtype), v) / total
        return None, (out.astype(v.dtype), largest + jnp.log(total))

    _, made = jax.lax.scan(of_block, None, (q, asking))
    out, lse = (checkpoint_name(each, "attention") for each in made)
    return out, (q, k, v, asking, known, out, lse)


def _attend_backward(equal, saved, d_out):
    q, k, v, asking, known, out, lse = saved
    # sum_k p_k dp_k of the softmax's backward pass, computed from the output instead of the weights
    inner = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1, keepdims=True)

    def of_block(sums, block):
        d_k, d_v = sums  # transposed, [B, G, E, k]: the matrix products then read the scores row by row
        queries, of_queries, d_rows, lse_rows, inner_rows = block
        weights = jnp.exp(_scores(queries, k, of_queries, known, equal) - lse_rows)
        d_scores = weights * (_einsum("bgqe,bgke->bgqk", d_rows, v) - inner_rows)
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        d_q = _einsum("bgqk,bgke->bgqe", d_scores, k).astype(q.dtype)
        d_k = d_k + _einsum("bgqe,bgqk->bgek", queries, d_scores)
        d_v = d_v + _einsum("bgqe,bgqk->bgek", d_rows, weights)
        return (d_k, d_v), d_q

    zero = jnp.zeros_like(k.swapaxes(-1, -2), jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(of_block, (zero, zero), (q, asking, d_out, lse, inner))
    d_k, d_v = (x.swapaxes(-1, -2).astype(k.dtype) for x in (d_k, d_v))
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_forward, _attend_backward)
