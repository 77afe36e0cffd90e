"""What a block keeps under each policy; that gradients stay the same is tested in test_prompt_group.py."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from mllm_align.models import remat
from mllm_align.models.decoder import Decoder
from mllm_align.models.families.registry import presets
from mllm_align.ops import cudnn, splash

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, SIZE, RANK = 3, 32, 80, 4, 2, 8, 2  # layers: of the stack
BATCH, PREFIX, RESPONSES, LENGTH = 2, 16, 2, 8
ROWS = BATCH * (PREFIX + RESPONSES * LENGTH)
LAST = BATCH * (1 + RESPONSES * LENGTH)  # rows that the last block computes queries and feed-forward for
WIDTHS = {"q": (HIDDEN, HEADS * SIZE), "k": (HIDDEN, KV_HEADS * SIZE), "v": (HIDDEN, KV_HEADS * SIZE)}
WIDTHS |= {"o": (HEADS * SIZE, HIDDEN), "gate": (HIDDEN, MLP), "up": (HIDDEN, MLP), "down": (MLP, HIDDEN)}


@pytest.fixture(scope="module")
def pulled():
    """pulled(policy) -> how many numbers are kept. Low-rank terms of the stack are trained."""
    c = dataclasses.replace(presets()["llava-1.6-7b"].decoder, vocab=64, layers=LAYERS + 1)
    c = dataclasses.replace(c, hidden=HIDDEN, mlp=MLP, heads=HEADS, kv_heads=KV_HEADS, head_dim=SIZE)

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    total = PREFIX + RESPONSES * LENGTH
    x, order = struct(BATCH, total, HIDDEN), struct(BATCH, total, dtype=jnp.int32)
    where = struct(BATCH, 1, total, dtype=jnp.int32), struct(BATCH, total, dtype=jnp.bool_)

    def given(*arrays):
        return *arrays, PREFIX, RESPONSES, jnp.full(BATCH, PREFIX - 1)

    args = x, order, *where
    start = jax.eval_shape(lambda *args: Decoder(c).init(jax.random.key(0), *given(*args)), *args)
    boxed = start["params"]
    params = jax.tree.map(lambda leaf: leaf.value, boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))
    lora = {"layers": {}}
    for name, (inner, outer) in WIDTHS.items():
        terms = {"a": struct(LAYERS, inner, RANK), "b": struct(LAYERS, RANK, outer)}
        lora["layers"][name] = terms

    @cache
    def pulled(policy):
        def kept(lora, x, params, *rest):
            def run(lora, x):
                return Decoder(c, policy).apply({"params": params, "lora": lora}, *given(x, *rest))

            return jax.vjp(run, lora, x)[1]

        found = jax.eval_shape(kept, lora, x, params, order, *where)
        return sum(leaf.size for leaf in jax.tree.leaves(found))

    return pulled


def of_blocks(*names, last=()):
    """Numbers in the results of these linear maps. last: those of the last block that all rows have."""
    stack = sum(ROWS * LAYERS * WIDTHS[name][1] for name in names)
    return stack + sum((ROWS if name in last else LAST) * WIDTHS[name][1] for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, less, difference",
    [
        ("dots", "gate", of_blocks("up") + len(WIDTHS) * RANK * ROWS * LAYERS),
        ("gate", "qkv", of_blocks("o", "gate")),
        ("qkv", "attention", of_blocks("q", "k", "v", last=("k", "v"))),
        # outputs, and the log-sum-exp of every head
        ("attention", "full", (HIDDEN + HEADS) * (ROWS * LAYERS + LAST)),
    ],
)
def test_what_is_kept(pulled, more, less, difference):
    """`down`, which the backward pass does not read, is kept by none."""
    assert pulled(more) - pulled(less) == difference


@pytest.mark.slow
def test_none_keeps_more_than_products(pulled):
    assert pulled("none") > pulled("dots")


@pytest.mark.parametrize("policy, runs", [("full", 2), ("attention", 1), ("dots", 1)])
@pytest.mark.parametrize("kernel", [splash, cudnn], ids=["splash", "cudnn"])
def test_kernels_run_forward_once_where_their_output_is_kept(monkeypatch, policy, runs, kernel):
    """And else again for the backward pass."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    heads = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)

    def attend(q, k, v):
        return kernel.full_attention(q, k, v).astype(jnp.float32).sum()

    both = jax.value_and_grad(jax.checkpoint(attend, policy=remat.POLICIES[policy]), argnums=(0, 1, 2))
    platform, forward = ("tpu", "_fwd_") if kernel is splash else ("cuda", "@__cudnn$fmhaSoftmax(")
    text = jax.jit(both).trace(heads, heads, heads).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(forward) == runs
