"""Chunked log-probabilities against a plain log-softmax, and the memory that they save."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.ops.logprobs import token_kl, token_logps


def plain(hidden, targets, kernel):
    return jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel), targets, axis=-1)


@pytest.mark.parametrize(
    "rows, count, candidates",
    [(1, 37, 1), (1, 37, 3), (1, 32, 1), (1, 9, 1), (1, 8, 1), (1, 7, 2), (3, 7, 2), (4, 5, 1), (9, 3, 1)],
)
def test_equals_log_softmax(rows, count, candidates):
    rng = np.random.default_rng(0)
    hidden, kernel = rng.standard_normal((rows, count, 16)), rng.standard_normal((16, 50))
    targets = rng.integers(0, 50, (rows, count, candidates))
    cotangent = rng.standard_normal(targets.shape)

    @jax.jit
    def run(hidden, kernel, cotangent):
        ids = jnp.asarray(targets, jnp.int32)
        out, pull = jax.vjp(lambda h, w: token_logps(h, ids, w, 8), hidden, kernel)
        return out, *pull(cotangent)

    found = run(*(jnp.asarray(x, jnp.float32) for x in (hidden, kernel, cotangent)))

    logits = hidden @ kernel
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.eye(50)[targets] - np.exp(logps)[:, :, None]  # [B, N, M, V], the gradient by the logits
    d_logits = (cotangent[..., None] * chosen).sum(2)
    d_kernel = np.einsum("bnd,bnv->dv", hidden, d_logits)
    expected = np.take_along_axis(logps, targets, -1), d_logits @ kernel.T, d_kernel
    for ours, plain_ in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, plain_, rtol=1e-5, atol=2e-5)


def test_bfloat16_states_give_float32_log_probs():
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 9, 16), (16, 50)))
    targets = jnp.asarray(rng.integers(0, 50, (1, 9, 1)), jnp.int32)
    found = token_logps(hidden, targets, kernel, 4)
    assert found.dtype == jnp.float32
    wide = plain(hidden.astype(jnp.float32), targets, kernel.astype(jnp.float32))
    np.testing.assert_allclose(found, wide, atol=1e-5)  # the products of bfloat16 are exact


def largest_array(function, of, shapes):
    """Numbers in the largest array of a gradient's program. of: the arguments of the gradient."""
    text = jax.jit(jax.grad(function, argnums=of)).lower(*shapes).compile().as_text()
    found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in sizes.split(",")]) for sizes in found)


def test_no_array_of_all_tokens_by_vocabulary():
    rows, count, dim, vocab, chunk = 4, 1024, 8, 512, 64
    shapes = [
        jax.ShapeDtypeStruct((rows, count, dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, count, 1), jnp.int32),
        jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
    ]

    def largest(function):
        return largest_array(lambda h, t, w: function(h, t, w).sum(), (0, 2), shapes)

    assert largest(plain) >= rows * count * vocab
    assert largest(lambda h, t, w: token_logps(h, t, w, chunk)) <= chunk * vocab


# ---- divergence of whole distributions ---------------------------------------------------------------


def plain_kl(hidden, kernel, reference, reference_kernel):
    policy, fixed = (
        jax.nn.log_softmax(h @ w) for h, w in ((hidden, kernel), (reference, reference_kernel))
    )
    return (jnp.exp(fixed) * (fixed - policy)).sum(-1)


@pytest.mark.parametrize("rows, count", [(1, 37), (1, 8), (3, 7), (9, 3)])
def test_the_divergence_by_hand(rows, count):
    """In float64; d KL / d logits = p - p_reference. Nothing of the reference has a gradient."""
    rng = np.random.default_rng(1)
    sizes = (rows, count, 16), (16, 50), (rows, count, 16), (16, 50)
    hidden, kernel, reference, other = arrays = [rng.standard_normal(size) for size in sizes]
    cotangent = rng.standard_normal((rows, count))

    @jax.jit
    def run(cotangent, *arrays):
        out, pull = jax.vjp(lambda *each: token_kl(*each, chunk=8), *arrays)
        return out, *pull(cotangent)

    out, *gradients = run(*(jnp.asarray(x, jnp.float32) for x in (cotangent, *arrays)))
    logps, fixed = (
        logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for logits in (hidden @ kernel, reference @ other)
    )
    d_logits = cotangent[..., None] * (np.exp(logps) - np.exp(fixed))
    np.testing.assert_allclose(out, (np.exp(fixed) * (fixed - logps)).sum(-1), rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(gradients[0], d_logits @ kernel.T, rtol=1e-5, atol=5e-5)
    expected = np.einsum("bnd,bnv->dv", hidden, d_logits)
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-5, atol=1e-4)
    assert not any(np.asarray(each).any() for each in gradients[2:])
    same = token_kl(*(jnp.asarray(x, jnp.float32) for x in (hidden, kernel, hidden, kernel)))
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_the_divergence_holds_no_array_of_all_tokens_by_vocabulary():
    sizes = (4, 1024, 8), (8, 512), (4, 1024, 8), (8, 512)
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    found = [
        largest_array(lambda *each, of=of: of(*each).sum(), (0, 1), shapes)
        for of in (plain_kl, lambda *each: token_kl(*each, chunk=64))
    ]
    assert found[0] >= 4 * 1024 * 512 and found[1] <= 64 * 512
