"""The calls made for cuDNN: by XLA, against the plain definition; and that JAX takes them for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import defined, pulled
from jax._src.cudnn import fused_attention_stablehlo as fused

from mllm_align.ops import attention, cudnn

BATCH, PREFIX, LENGTH, DIM = 3, 21, 7, 8


def inputs(responses, heads, groups):
    """q, k, v and a cotangent; visible keys: all of the prefix, its start, none; who sees any."""
    rng = np.random.default_rng(0)
    total = PREFIX + responses * LENGTH
    arrays = [rng.standard_normal((BATCH, total, n, DIM)) for n in (heads, groups, groups, heads)]
    visible = rng.random((BATCH, total)) < 0.7  # responses may have holes
    visible[:, :PREFIX] = np.arange(PREFIX) < np.array([PREFIX, PREFIX - 6, 0])[:, None]
    visible[2] = False
    return arrays, visible, visible.any(1)[:, None, None, None]


def ours(visible, responses):
    layout = {"prefix": PREFIX, "responses": responses, "implementation": "xla"}
    return lambda q, k, v: cudnn.prompt_group_attention(q, k, v, visible, **layout)


@pytest.mark.parametrize("responses, heads, groups", [(0, 2, 2), (1, 2, 2), (3, 4, 2)])
def test_equals_the_definition(responses, heads, groups):
    (*qkv, cotangent), visible, sees = inputs(responses, heads, groups)
    found = pulled(ours(visible, responses), *qkv, cotangent)
    expected = defined(*qkv, cotangent, visible, sees, PREFIX, responses)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not any(x[2].any() for x in found)  # the row that sees nothing


def test_bfloat16_is_near():
    (*qkv, cotangent), visible, sees = inputs(2, 6, 2)
    *qkv, cotangent = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (*qkv, cotangent))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes types
        found = pulled(ours(visible, 2), *qkv, cotangent, jnp.bfloat16)
    expected = defined(*qkv, cotangent, visible, sees, PREFIX, 2)
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_some_rows_of_the_prefix_get_what_all_rows_get():
    (q, k, v, _), visible, _ = inputs(2, 4, 2)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    attend, some = jax.jit(ours(visible, 2)), slice(PREFIX - 1, None)
    np.testing.assert_allclose(attend(q[:, some], k, v), attend(q, k, v)[:, some], atol=2e-6)


@pytest.mark.parametrize("images", [None, 1, 2])
def test_full_attention(images):
    """Also of rows with so many images, which do not see each other, and padding after them."""
    (q, k, v, cotangent), _, _ = inputs(0, 2, 2)  # an odd number of tokens, as 577
    segments, own = None, 1
    if images:
        place, ends = np.arange(PREFIX), np.array([[PREFIX], [PREFIX - 7], [0]])
        segments = np.where(place < ends, np.minimum(1 + place // 9, images), 0).astype(np.int32)
        own = (segments > 0)[:, :, None, None].astype(np.float32)

    def ours(*qkv):
        return cudnn.full_attention(*qkv, segments, implementation="xla") * own

    found = pulled(ours, q, k, v, cotangent)
    expected = pulled(lambda *qkv: attention.full_attention(*qkv, segments) * own, q, k, v, cotangent)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def lowered(attend, *shapes):
    """The program for CUDA, outputs and gradients; no GPU is needed to write it down."""

    def step(q, k, v, cotangent):
        out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(cotangent))

    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (*shapes, shapes[0])]
    return jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("heads, groups", [(32, 32), (32, 8), (7, 1)])
@pytest.mark.parametrize("prefix, responses, length", [(2879, 2, 101), (2928, 1, 128), (576, 0, 0)])
def test_jax_takes_the_calls_of_a_prompt_group(monkeypatch, heads, groups, prefix, responses, length):
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    total = prefix + responses * length
    visible = jnp.ones((2, total), bool)

    def attend(q, k, v):
        return cudnn.prompt_group_attention(q, k, v, visible, prefix, responses)

    q, k = (2, total, heads, 128), (2, total, groups, 128)
    text = lowered(attend, q, k, k)
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert text.count("PADDING_CAUSAL") == 2
    biased = int(responses > 0)
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == biased
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == biased
    assert not responses or f"x{total}x{total}x" not in text


def test_jax_takes_the_calls_of_the_vision_tower(monkeypatch):
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    segments = jnp.ones((5, 577), jnp.int32)
    for attend in (cudnn.full_attention, lambda *qkv: cudnn.full_attention(*qkv, segments)):
        text = lowered(attend, *[(5, 577, 16, 64)] * 3)
        assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    short = lowered(lambda *qkv: cudnn.full_attention(*qkv, segments, 64), *[(5, 577, 16, 64)] * 3)
    assert "fmha" not in short and "577x577" not in short
