"""Prompt-group attention against separate rows, written out plainly in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import pulled

from mllm_align.ops.attention import fork_attention, full_attention, prompt_group_attention

BATCH, PREFIX, LENGTH, DIM = 2, 13, 7, 6


def plain_attention(q, k, v, mask, d_out):
    """Softmax attention of one row, [S, H, E] and [S, S]: its output and the gradients of q, k, v."""
    keys, groups, dim = k.shape
    share, scale = q.shape[1] // groups, q.shape[-1] ** -0.5
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    scores = np.where(mask, np.einsum("qhe,khe->hqk", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("qhe,khe->hqk", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_k = np.einsum("hqk,qhe->khe", d_scores, q).reshape(keys, groups, share, dim).sum(2)
    d_v = np.einsum("hqk,qhe->khe", weights, d_out).reshape(keys, groups, share, dim).sum(2)
    d_q = np.einsum("hqk,khe->qhe", d_scores, k)
    return np.einsum("hqk,khe->qhe", weights, v), d_q, d_k, d_v


def separate_rows(q, k, v, visible, responses, d_out):
    """Each response on a row of its own after the prefix, causal by its place on that row."""
    total = [np.zeros_like(x) for x in (q, q, k, v)]
    for b in range(len(q)):
        for r in range(max(responses, 1)):
            own = PREFIX + np.arange(r * LENGTH, (r + 1) * LENGTH if responses else 0)
            at = np.concatenate([np.arange(PREFIX), own])
            mask = np.tril(np.ones((len(at), len(at)), bool)) & visible[b, at]
            d_row = d_out[b, at].copy()
            if r:  # the prefix's own output is on every row, and counts once
                d_row[:PREFIX] = 0
            out, *grads = plain_attention(q[b, at], k[b, at], v[b, at], mask, d_row)
            total[0][b, at] = out
            for sum_, grad in zip(total[1:], grads, strict=True):
                sum_[b, at] += grad
    return total


def inputs(responses, heads, groups, seed=0):
    """q, k, v; positions that rise with gaps and restart at each response; some keys masked."""
    rng = np.random.default_rng(seed)
    total = PREFIX + responses * LENGTH
    q, k, v = (rng.standard_normal((BATCH, total, n, DIM)) for n in (heads, groups, groups))
    visible = rng.random((BATCH, total)) < 0.7
    visible[:, 0] = True
    positions = []
    for b in range(BATCH):
        real = PREFIX - 3 * b  # ragged: the second row's prefix ends earlier
        visible[b, real:PREFIX] = False
        prefix = np.cumsum(rng.integers(1, 4, PREFIX))
        after = prefix[real - 1] + 1 + np.arange(LENGTH)
        positions.append(np.concatenate([prefix, *[after] * responses]))
        for r in range(responses):
            visible[b, PREFIX + r * LENGTH + LENGTH - r :][:r] = False
    return (q, k, v), np.array(positions, np.int32), visible


def real_queries(visible):
    """Padding may see later padding's position; what it computes counts for nothing."""
    real = np.ones_like(visible)
    real[1, PREFIX - 3 : PREFIX] = False
    return real


def grouped(qkv, positions, visible, responses, cotangent, span, block, dtype=jnp.float32):
    @jax.jit
    def run(q, k, v, cotangent):
        def ours(q, k, v):
            return prompt_group_attention(
                q, k, v, positions, positions, visible, PREFIX, responses, span=span, block=block
            )

        out, pull = jax.vjp(ours, q, k, v)
        return (out, *pull(cotangent))

    return [np.asarray(x) for x in run(*(jnp.asarray(x, dtype) for x in (*qkv, cotangent)))]


@pytest.mark.parametrize(
    "responses, heads, groups, span, block",
    [(0, 2, 2, 5, 2), (1, 4, 2, 384, 128), (2, 2, 2, 9, 4), (3, 6, 2, 384, 5)],
)
def test_equals_separate_rows(responses, heads, groups, span, block):
    qkv, positions, visible = inputs(responses, heads, groups)
    real = real_queries(visible)[:, :, None, None]
    cotangent = np.random.default_rng(1).standard_normal(qkv[0].shape) * real
    expected = separate_rows(*qkv, visible, responses, cotangent)
    found = grouped(qkv, positions, visible, responses, cotangent, span, block)
    np.testing.assert_allclose(found[0] * real, expected[0] * real, atol=2e-6)
    for ours, plain in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_bfloat16_is_near():
    qkv, positions, visible = inputs(1, 4, 2)
    qkv = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in qkv]
    real = real_queries(visible)[:, :, None, None]
    cotangent = np.random.default_rng(1).integers(-2, 3, qkv[0].shape) * real
    expected = separate_rows(*qkv, visible, 1, cotangent)
    found = grouped(qkv, positions, visible, 1, cotangent, 384, 128, jnp.bfloat16)
    mask = [real, 1, 1, 1]
    for ours, plain, counts in zip(found, expected, mask, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.linalg.norm((np.asarray(ours, np.float64) - plain) * counts)
        assert error < 0.01 * np.linalg.norm(plain * counts)


def test_a_row_without_a_visible_key_stays_finite():
    qkv, positions, visible = inputs(1, 4, 2)
    visible[1] = False
    cotangent = np.random.default_rng(1).standard_normal(qkv[0].shape)
    found = grouped(qkv, positions, visible, 1, cotangent, 9, 4)
    assert all(np.isfinite(x).all() for x in found)
    first = [x[:1] for x in qkv]
    expected = separate_rows(*first, visible[:1], 1, cotangent[:1])
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[:1], plain, atol=1e-5)


def test_siblings_are_not_seen():
    qkv, positions, visible = inputs(3, 2, 2)
    second = slice(PREFIX + LENGTH, PREFIX + 2 * LENGTH)
    qkv, positions, visible = jax.tree.map(lambda x: np.concatenate([x, x]), (qkv, positions, visible))
    for x in qkv:
        x[BATCH:, second] += 1
    zero = np.zeros(qkv[0].shape)
    before, after = np.split(grouped(qkv, positions, visible, 3, zero, 384, 128)[0], 2)
    changed = np.abs(after - before).max((0, 2, 3)) > 0
    assert changed[second].all() and changed.sum() == LENGTH


def test_full_attention_sees_everything():
    q, k, v = inputs(1, 4, 4)[0]
    found = full_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    for b in range(BATCH):
        plain, *_ = plain_attention(q[b], k[b], v[b], True, q[b])
        np.testing.assert_allclose(found[b], plain, atol=2e-6)


def test_full_attention_keeps_to_segments():
    """Gradients too."""
    q, k, v = inputs(1, 4, 4)[0]
    segments = np.repeat(np.arange(3, dtype=np.int32), (5, 1, q.shape[1] - 6))
    every = jnp.asarray(np.stack([segments] * BATCH))
    found = pulled(lambda *qkv: full_attention(*qkv, every), q, k, v, q)
    for b in range(BATCH):
        plain = plain_attention(q[b], k[b], v[b], segments[:, None] == segments[None], q[b])
        for ours, wanted in zip(found, plain, strict=True):
            np.testing.assert_allclose(ours[b], wanted, atol=2e-5)


@pytest.mark.parametrize("tokens, longest", [(20, 4), (17, 6), (5, 4), (4, 4), (3, 4)])
def test_full_attention_within_short_segments(tokens, longest):
    """Blocks of keys beside each other give what all keys give, gradients too; 0 stands for padding."""
    rng = np.random.default_rng(0)
    q, k, v, cotangent = rng.standard_normal((4, BATCH, tokens, 2, DIM))
    lengths = rng.integers(1, longest + 1, (BATCH, tokens))
    segments = np.stack([np.repeat(1 + np.arange(tokens), each)[:tokens] for each in lengths])
    segments[1, -longest + 1 :] = 0
    segments = jnp.asarray(segments, jnp.int32)
    found, wanted = (
        pulled(lambda *qkv, n=n: full_attention(*qkv, segments, n), q, k, v, cotangent)
        for n in (longest, None)
    )
    for ours, plain in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-6)


def test_some_rows_of_the_prefix_get_what_all_rows_get():
    qkv, positions, visible = inputs(2, 4, 2)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in qkv)
    every = prompt_group_attention(q, k, v, positions, positions, visible, PREFIX, 2)
    rows = np.array([1, 4, *range(PREFIX, q.shape[1])])
    some = prompt_group_attention(q[:, rows], k, v, positions[:, rows], positions, visible, PREFIX, 2)
    np.testing.assert_allclose(some, every[:, rows], atol=2e-6)


# ---- one token of every fork -------------------------------------------------------------------------

forked = jax.jit(fork_attention)


def reach(steps):
    """Of every row."""
    return np.full(BATCH, steps, np.int32)


@pytest.mark.parametrize("heads, groups, step", [(2, 2, 0), (4, 2, 3), (6, 1, 4)])
def test_forks_see_the_prefix_their_own_tokens_and_themselves(heads, groups, step):
    rng, forks, room = np.random.default_rng(0), 3, 5
    q = rng.standard_normal((BATCH, forks, heads, DIM))
    prefix = [rng.standard_normal((BATCH, groups, PREFIX, DIM)) for _ in range(2)]
    own = [rng.standard_normal((BATCH, forks, groups, room, DIM)) for _ in range(2)]
    seen = rng.random((BATCH, forks, PREFIX)) < 0.6
    seen[1, 2] = False  # nothing of the prefix
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (q, prefix, own))
    found = forked(*arrays, seen, reach(step), step)
    assert found.shape == q.shape
    for b in range(BATCH):
        for f in range(forks):
            keys, values = (
                np.concatenate([p[b].swapaxes(0, 1), o[b, f].swapaxes(0, 1)[: step + 1]])
                for p, o in zip(prefix, own, strict=True)
            )
            mask = np.concatenate([seen[b, f], np.ones(step + 1, bool)])[None]
            keys, values = keys[mask[0]], values[mask[0]]
            share = heads // groups
            scores = np.einsum("he,khe->hk", q[b, f], np.repeat(keys, share, axis=1)) * DIM**-0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            plain = np.einsum("hk,khe->he", weights, np.repeat(values, share, axis=1))
            np.testing.assert_allclose(found[b, f], plain, atol=2e-6)


def test_forks_in_bfloat16_are_near_and_ignore_what_is_not_theirs():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    q, prefix = draw(BATCH, 2, 4, 8), (draw(BATCH, 2, 9, 8), draw(BATCH, 2, 9, 8))
    own = draw(BATCH, 2, 2, 4, 8), draw(BATCH, 2, 2, 4, 8)
    seen = jnp.arange(9)[None, None] < jnp.array([9, 4])[None, :, None]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (q, prefix, own))
    found, expected = (forked(*x, seen, reach(2), 2) for x in ((q, prefix, own), wide))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.03)
    # other values where nothing is seen: keys at or after the start, places not yet written
    later = jax.tree.map(lambda x: x.at[:, :, 4:].add(5), prefix)
    unwritten = jax.tree.map(lambda x: x.at[..., 3:, :].add(5), own)
    again = forked(q, later, unwritten, seen, reach(2), 2)
    np.testing.assert_array_equal(again[:, 1], found[:, 1])


@pytest.mark.parametrize("window, heads, groups, step", [(3, 2, 2, 4), (2, 4, 2, 0)])
def test_forks_with_a_window_see_their_last_tokens(window, heads, groups, step):
    """As if the earlier ones were not there, wherever the columns begin."""
    rng, forks, room = np.random.default_rng(0), 2, 6
    q = rng.standard_normal((BATCH, forks, heads, DIM))
    own = [rng.standard_normal((BATCH, forks, groups, room, DIM)) for _ in range(2)]
    prefix = [rng.standard_normal((BATCH, groups, PREFIX, DIM)) for _ in range(2)]
    q, prefix, own = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (q, prefix, own))
    seen, first = np.ones((BATCH, forks, PREFIX), bool), step - window + 1
    near = step - max(first, 0)
    found = forked(q, prefix, own, seen, reach(near), step)
    cut = [x[..., max(first, 0) :, :] for x in own]
    np.testing.assert_allclose(found, forked(q, prefix, cut, seen, reach(near), near), atol=2e-6)
    turned = [jnp.roll(x, room - 2 - step, axis=3) for x in own]
    for shift, x in ((room - 2, turned), (1, [jnp.roll(x, 3, axis=3) for x in turned])):
        np.testing.assert_allclose(found, forked(q, prefix, x, seen, reach(near), shift), atol=2e-6)
    if first > 0:
        assert np.abs(found - forked(q, prefix, own, seen, reach(step), step)).max() > 1e-3


# ---- blocks that see themselves, and windows ---------------------------------------------------------

BLOCKS = ((2, 6), (8, 11))  # of the prefix, before keys are taken out


@pytest.mark.parametrize(
    "asking, window",
    [
        ("all rows", 3),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("all rows", None), ("one row", 6))),
    ],
)
def test_blocks_and_windows(asking, window):
    """Against the masks written out: a key counts if it is before the query or in its block, and near.
    Places have gaps, as where masked embeddings were taken out."""
    rng, span, total = np.random.default_rng(0), 5, PREFIX + 2 * LENGTH
    q, k, v = (rng.standard_normal((BATCH, total, n, DIM)) for n in (4, 2, 2))
    place, visible = np.zeros((BATCH, total), np.int32), rng.random((BATCH, total)) < 0.8
    order, mask = place.copy(), np.zeros((BATCH, total, total), bool)
    for b, real in enumerate((PREFIX, PREFIX - 2)):
        at = np.sort(rng.choice(PREFIX + 4, real, replace=False))
        start = np.array([next((a for a, z in BLOCKS if a <= x < z), x) for x in at])
        after = at[-1] + 1 + np.arange(LENGTH)
        place[b], order[b] = (
            np.concatenate([x, np.zeros(PREFIX - real), after, after]) for x in (at, start)
        )
        visible[b, real:PREFIX] = False
        whose = np.repeat([0, 1, 2], (PREFIX, LENGTH, LENGTH))
        block = [next((n for n, (a, z) in enumerate(BLOCKS) if a <= x < z), -1) for x in place[b, :PREFIX]]
        block = np.array([*block, *[-1] * 2 * LENGTH])
        for i, j in np.ndindex(total, total):
            alike = block[i] == block[j] != -1
            own = whose[j] in (0, whose[i]) and (place[b, j] <= place[b, i] or alike)
            near = window is None or place[b, i] - place[b, j] < window
            mask[b, i, j] = own and near and visible[b, j]
    rows = np.arange(total) if asking == "all rows" else np.array([PREFIX - 3, *range(PREFIX, total)])
    sees = mask[:, rows].any(-1)
    sees[1] &= ~((rows >= PREFIX - 2) & (rows < PREFIX))
    cotangent = rng.standard_normal((BATCH, len(rows), 4, DIM)) * sees[:, :, None, None]

    def ours(q, k, v):
        places = None if window is None else (jnp.asarray(place[:, rows]), jnp.asarray(place))
        arrays = jnp.asarray(order[:, rows]), jnp.asarray(order), jnp.asarray(visible)
        options = {"ahead": 4, "window": window, "places": places, "span": span, "block": 2}
        return prompt_group_attention(q, k, v, *arrays, PREFIX, 2, **options)

    found = pulled(ours, q[:, rows], k, v, cotangent)
    for b in range(BATCH):
        kept = rows[sees[b]]
        whole = plain_attention(q[b, kept], k[b], v[b], mask[b, kept], cotangent[b, sees[b]])
        for ours_, wanted in zip((found[0][b, sees[b]], found[1][b, sees[b]]), whole[:2], strict=True):
            np.testing.assert_allclose(ours_, wanted, atol=1e-5)
        for ours_, wanted in zip((found[2][b], found[3][b]), whole[2:], strict=True):
            np.testing.assert_allclose(ours_, wanted, atol=1e-5)
