"""Which kernel is taken where; what the kernels compute is tested beside them."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.config import MeshConfig
from mllm_align.models import attention
from mllm_align.models.families.registry import presets
from mllm_align.ops import attention as xla
from mllm_align.ops import cudnn, splash
from mllm_align.sharding import make_mesh, traced_within


@pytest.mark.parametrize(
    "platform, dtype, size, holes, expected",
    [
        ("cpu", "bfloat16", 128, False, xla),
        ("tpu", "bfloat16", 128, False, splash),
        ("tpu", "float32", 64, True, splash),
        ("tpu", "bfloat16", 72, False, splash),
        ("tpu", "bfloat16", 32, False, xla),
        ("tpu", "bfloat16", 160, False, xla),
        ("tpu", "bfloat16", 256, False, splash),
        ("gpu", "bfloat16", 128, False, cudnn),
        ("gpu", "float16", 64, False, cudnn),
        ("gpu", "bfloat16", 72, False, cudnn),
        ("gpu", "bfloat16", 128, True, xla),
        ("gpu", "float32", 128, False, xla),
        ("gpu", "bfloat16", 256, False, xla),
        ("gpu", "bfloat16", 12, False, xla),
    ],
)
def test_backends(monkeypatch, platform, dtype, size, holes, expected):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    assert attention.backend(jax.ShapeDtypeStruct((1, 1, 1, size), dtype), holes) is expected


@pytest.mark.parametrize("config", presets().values(), ids=presets())
def test_published_models_run_on_kernels(monkeypatch, config):
    """But for decoders whose images see themselves, on NVIDIA GPUs."""
    for platform, kernel in (("tpu", splash), ("gpu", cudnn)):
        monkeypatch.setattr(attention, "platform", lambda name=platform: name)
        special = config.decoder.image_block > 0
        decoder, tower = config.decoder.head_dim, config.vision.hidden // config.vision.heads
        for size, data, wanted in (
            (tower, False, kernel),
            (decoder, special, xla if special and kernel is cudnn else kernel),
        ):
            assert attention.backend(jax.ShapeDtypeStruct((1, 1, 1, size), "bfloat16"), data) is wanted


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--xla_gpu_deterministic_ops=true", xla),
        ("--xla_dump_to=/tmp --xla_gpu_exclude_nondeterministic_ops", xla),
        ("--xla_gpu_deterministic_ops=false", cudnn),
        ("", cudnn),
    ],
)
def test_cudnn_is_left_alone_where_operations_must_be_deterministic(monkeypatch, flags, expected):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert attention.backend(jax.ShapeDtypeStruct((1, 1, 1, 128), "bfloat16")) is expected


@pytest.mark.parametrize("kernel", [splash, cudnn], ids=["splash", "cudnn"])
@pytest.mark.parametrize("asking", ["all rows", "one row"])
def test_kernels_stand_in_for_xla(monkeypatch, kernel, asking):
    """On a mesh that cuts rows and heads, with fewer key heads than devices; also where of the prefix only
    the last real token asks, as in the decoder's last block."""
    rng = np.random.default_rng(0)
    prefix, length, heads, size = 8, 4, 4, 8
    total = prefix + 2 * length
    q, k, v = (rng.standard_normal((2, total, n, size)).astype(np.float32) for n in (heads, 1, 1))
    visible = np.ones((2, total), bool)
    visible[1, 6:prefix] = False
    real = np.array([8, 6])
    after = real[:, None] + np.arange(length)
    first = np.where(np.arange(prefix) < real[:, None], np.arange(prefix), 0)
    positions = np.concatenate([first, after, after], axis=1).astype(np.int32)
    asked, rows = positions, np.arange(total)[None].repeat(2, 0)
    if asking == "one row":
        rows = np.concatenate([real[:, None] - 1, np.arange(prefix, total)[None].repeat(2, 0)], axis=1)
        asked, q = (
            np.take_along_axis(x, i, 1) for x, i in ((positions, rows), (q, rows[:, :, None, None]))
        )
    counts = visible[np.arange(2)[:, None], rows][:, :, None, None]

    def run(*arrays):
        return attention.prompt_group_attention(*arrays, prefix, 2)

    step = jax.jit(traced_within(make_mesh(MeshConfig(2, 1, 4)), run))
    expected = np.asarray(step(*map(jnp.asarray, (q, k, v, asked, positions, visible))))
    how = {"interpret": True} if kernel is splash else {"implementation": "xla"}
    here = SimpleNamespace(prompt_group_attention=partial(kernel.prompt_group_attention, **how))
    monkeypatch.setattr(attention, "backend", lambda *_: here)
    step = jax.jit(traced_within(make_mesh(MeshConfig(2, 1, 4)), lambda *a: run(*a)))
    found = np.asarray(step(*map(jnp.asarray, (q, k, v, asked, positions, visible))))
    np.testing.assert_allclose(found * counts, expected * counts, atol=2e-5)


@pytest.mark.parametrize("windowed", [False, True])
def test_cpus_take_few_rows_at_a_time(monkeypatch, windowed):
    """What all rows at once give, to the gradient, of towers and decoders."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.array(rng.standard_normal((6, 24, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.array(rng.integers(1, 3, (6, 24)).cumsum(1) // 8, jnp.int32)
    order = jnp.broadcast_to(jnp.concatenate([jnp.arange(16), *[16 + jnp.arange(4)] * 2]), (6, 24))
    visible = jnp.array(rng.random((6, 24)) < 0.9)
    more = {"window": 5, "places": (2 * order, 2 * order)} if windowed else {}

    def run(q, k, v):
        own = attention.full_attention(q, q, q), attention.full_attention(q, q, q, segments)
        short = attention.full_attention(q, q, q, segments, 8)
        group = attention.prompt_group_attention(q, k, v, order, order, visible, 16, 2, **more)
        return sum(jnp.sin(x).sum() for x in (*own, short, group))

    def found():
        step = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))
        return step(q, k, v), step.lower(q, k, v).as_text()

    whole, text = found()
    scores = "tensor<{}x4x24x24xf32>".format
    assert scores(6) in text
    for most, rows in ((4 * 24 * 24 - 1, 1), (5 * 4 * 24 * 24, 3)):  # of 6, in equal parts
        monkeypatch.setattr(attention, "SCORES", most)
        few, text = found()
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), few, whole)
        assert scores(rows) in text and scores(6) not in text
