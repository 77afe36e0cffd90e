"""Splash attention, its kernels interpreted, against the plain definition; and compiled for a TPU."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import LENGTH, PREFIX, allowed, defined, pulled
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from mllm_align.ops import attention, splash
from mllm_align.ops.splash_mask import PromptGroupMask

BATCH, DIM = 3, 8


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    if "slow" not in request.keywords:
        monkeypatch.setattr(splash, "MAX_BLOCK", 128)


def inputs(responses, heads, groups, size=DIM):
    """q, k, v and a cotangent; which keys are visible: with holes, a shorter prefix, none at all."""
    rng = np.random.default_rng(0)
    total = PREFIX + responses * LENGTH
    arrays = [rng.standard_normal((BATCH, total, n, size)) for n in (heads, groups, groups, heads)]
    visible = rng.random((BATCH, total)) < 0.7
    visible[0, :3] = False  # the first queries see nothing
    visible[1, PREFIX - 30 : PREFIX] = False
    visible[2] = False
    sees = (allowed(responses)[None] & visible[:, None]).any(-1)
    return arrays, visible, sees[:, :, None, None]


def ours(visible, responses):
    return lambda q, k, v: splash.prompt_group_attention(
        q, k, v, visible, PREFIX, responses, interpret=True
    )


@pytest.mark.parametrize("responses, heads, groups", [(0, 1, 1), (1, 2, 2), (3, 4, 2)])
def test_equals_the_definition(responses, heads, groups):
    (*qkv, cotangent), visible, sees = inputs(responses, heads, groups)
    found = pulled(ours(visible, responses), *qkv, cotangent)
    expected = defined(*qkv, cotangent, visible, sees, PREFIX, responses)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert not found[0][2].any() and not any(x[2].any() for x in found[1:])  # the row that sees nothing


def test_bfloat16_is_near():
    (*qkv, cotangent), visible, sees = inputs(2, 2, 1)
    *qkv, cotangent = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (*qkv, cotangent))
    found = pulled(ours(visible, 2), *qkv, cotangent, jnp.bfloat16)
    expected = defined(*qkv, cotangent, visible, sees, PREFIX, 2)
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def reaching(asking, window):
    """Orders, places, visible keys, and which queries see one, of rows with two blocks in the prefix."""
    rng, total = np.random.default_rng(1), PREFIX + 2 * LENGTH
    order, place, visible = (np.zeros((BATCH, total), np.int32) for _ in range(3))
    for b, real in enumerate((PREFIX, PREFIX - 27, PREFIX - 1)):
        at = np.sort(rng.choice(PREFIX + 40, real, replace=False))  # of more tokens, some taken out
        block = np.where((at >= 20) & (at < 61), 20, np.where((at >= 70) & (at < 110), 70, at))
        after = at[-1] + 1 + np.arange(LENGTH)
        order[b], place[b] = (
            np.concatenate([x, np.zeros(PREFIX - real), after, after]) for x in (block, at)
        )
        visible[b, :real], visible[b, PREFIX:] = rng.random(real) < 0.8, rng.random(2 * LENGTH) < 0.9
    visible[2, PREFIX:] = False
    rows = np.arange(total) if asking == PREFIX else np.r_[100, PREFIX:total]
    whose = np.where(np.arange(total) < PREFIX, 0, 1 + (np.arange(total) - PREFIX) // LENGTH)
    mask = (order[:, None] <= order[:, rows, None]) & (visible[:, None] > 0)
    mask &= (whose[None] == whose[rows, None]) | (whose[None] == 0)
    if window:
        mask &= place[:, None] > place[:, rows, None] - window
    return order, place, visible > 0, rows, mask.any(-1)[:, :, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("asking, window", [(PREFIX, None), (PREFIX, 60), (1, 60)])
def test_blocks_and_windows(asking, window, monkeypatch):
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    (q, k, v, cotangent), _, _ = inputs(2, 2, 1)
    order, place, visible, rows, sees = reaching(asking, window)
    data = jnp.asarray(order[:, rows]), jnp.asarray(order)
    ranges: dict = {"ahead": 41, "window": window}
    ranges["places"] = None if window is None else (jnp.asarray(place[:, rows]), jnp.asarray(place))

    def ours(q, k, v):
        arrays = q, k, v, visible, PREFIX, 2, True
        return splash.prompt_group_attention(*arrays, **ranges, orders=data)

    def definition(q, k, v):
        return attention.prompt_group_attention(q, k, v, *data, visible, PREFIX, 2, **ranges)

    q, cotangent = q[:, rows], cotangent[:, rows] * sees
    expected, found = pulled(definition, q, k, v, cotangent), pulled(ours, q, k, v, cotangent)
    assert asking == 1 or not sees.all()
    for a, b in zip(found, [expected[0] * sees, *expected[1:]], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_some_rows_of_the_prefix_get_what_all_rows_get():
    (q, k, v, _), visible, _ = inputs(2, 2, 1)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    attend = jax.jit(ours(visible, 2))
    np.testing.assert_allclose(
        attend(q[:, PREFIX - 1 :], k, v), attend(q, k, v)[:, PREFIX - 1 :], atol=2e-6
    )


@pytest.mark.parametrize("size, cut", [(DIM, True), (72, False)])
def test_full_attention(size, cut):
    """72, the size of SigLIP's larger heads, is filled up. cut: into segments, as images are."""
    (q, k, v, cotangent), _, _ = inputs(0, 1, 1, size)
    ends = np.array([[20, 140], [PREFIX, PREFIX], [0, 3]])
    segments = (np.arange(PREFIX)[None, :, None] >= ends[:, None]).sum(-1, dtype=np.int32) if cut else None

    def ours(*qkv):
        return splash.full_attention(*qkv, segments, interpret=True)

    found = pulled(ours, q, k, v, cotangent)
    expected = pulled(lambda *qkv: attention.full_attention(*qkv, segments), q, k, v, cotangent)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_full_attention_within_short_segments():
    rng, tokens, longest = np.random.default_rng(0), 600, 64
    q, k, v, cotangent = rng.standard_normal((4, BATCH, tokens, 1, DIM))
    lengths = rng.integers(1, longest + 1, (BATCH, tokens))
    segments = np.stack([np.repeat(1 + np.arange(tokens), each)[:tokens] for each in lengths])
    segments[1, -50:] = 0
    segments = jnp.asarray(segments, jnp.int32)
    kinds = {"interpret": True}, {}
    found, expected = (
        pulled(lambda *qkv, a=attend, k=kind: a(*qkv, segments, longest, **k), q, k, v, cotangent)
        for attend, kind in zip((splash.full_attention, attention.full_attention), kinds, strict=True)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("longest", [None, 64])
def test_blocks_beyond_short_segments_are_skipped(longest):
    """Of a picture of 1,280 embeddings."""
    size, total = splash._blocks(5120, longest)
    mask = masks.FullMask((total, total))
    if longest:
        mask = masks.LocalMask((total, total), (longest - 1, longest - 1), 0)
    cut = {"block_sizes": kernels.BlockSizes(*[size] * 8), "head_shards": 1, "q_seq_shards": 1}
    info = kernels.make_splash_mha(masks.MultiHeadMask([mask]), **cut).fwd_mask_info
    blocks = total // size
    visited = blocks**2 if info.block_mask is None else np.count_nonzero(info.block_mask)
    assert visited == (3 * blocks - 2 if longest else blocks**2)


def test_blocks_above_the_diagonal_and_between_siblings_are_skipped():
    prefix, responses, length = 896, 4, 256
    mask = PromptGroupMask(prefix, responses, length, prefix, 1920, 1920)
    size = kernels.BlockSizes(*[128] * 8)
    cut = {"block_sizes": size, "head_shards": 1, "q_seq_shards": 1}
    kernel = kernels.make_splash_mha(masks.MultiHeadMask([mask] * 2), **cut)
    visited = 7 * 8 // 2 + responses * (2 * 7 + 3)  # of 15 * 15
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        assert info.partial_mask_blocks is None
        assert np.count_nonzero(info.block_mask) == visited
    assert splash.scores(prefix, responses, length) == visited * 128**2


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from mllm_align.ops import splash

chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
prefix, responses, length = 2928, 2, 336
total = prefix + responses * length

def step(q, k, v, visible, cotangent):
    def attend(q, k, v):
        return splash.prompt_group_attention(q, k, v, visible, prefix, responses)

    out, pull = jax.vjp(attend, q, k, v)
    return (out, *pull(cotangent))

def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(chip))

q, k = like(1, total, 2, 128), like(1, total, 1, 128)
print(jax.jit(step).lower(q, k, k, like(1, total, dtype=bool), q).compile().as_text())
"""


@pytest.mark.slow
def test_compiled_for_a_tpu_nothing_is_as_large_as_the_scores():
    """At LLaVA-1.6's sizes, with so few heads that theirs are smaller than [S, S]."""
    pytest.importorskip("libtpu")
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # libtpu has others
    own |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('custom_call_target="tpu_custom_call"') == 3
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", run.stdout)
    largest = max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)
    assert 3600 * 2 * 128 <= largest < 3600**2
