"""Chunked log-probabilities against a plain log-softmax, and the memory that they save."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.ops.logprobs import token_logps


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


def test_no_array_of_all_tokens_by_vocabulary():
    rows, count, dim, vocab, chunk = 4, 1024, 8, 512, 64
    shapes = [
        jax.ShapeDtypeStruct((rows, count, dim), jnp.float32),
        jax.ShapeDtypeStruct((rows, count, 1), jnp.int32),
        jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
    ]

    def largest(function):
        gradient = jax.grad(lambda h, t, w: function(h, t, w).sum(), argnums=(0, 2))
        text = jax.jit(gradient).lower(*shapes).compile().as_text()
        found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
        return max(np.prod([int(n) for n in sizes.split(",")]) for sizes in found)

    assert largest(plain) >= rows * count * vocab
    assert largest(lambda h, t, w: token_logps(h, t, w, chunk)) <= chunk * vocab
