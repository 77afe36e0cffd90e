"""LoRA as a parameter tree beside the frozen base (Hu et al. 2021)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mllm_align.models.config import LlavaConfig
from mllm_align.models.names import decoder_linears

Tree = dict[str, Any]


def init_lora(config: LlavaConfig, rank: int, targets: tuple[str, ...], key: jax.Array) -> Tree:
    """float32 `a` [layers, in, rank] (uniform, as torch's linear layers) and `b` [layers, rank, out] (0).

    The tree has the shape of Llava's parameters: decoder / layers / <target> / {a, b}.
    """
    shapes = decoder_linears(config)
    layers, tree = config.decoder.layers, {}
    for name, place in zip(targets, jax.random.split(key, len(targets)), strict=True):
        out, inner = shapes[name][1]
        bound = 1 / math.sqrt(inner)
        a = jax.random.uniform(place, (layers, inner, rank), jnp.float32, -bound, bound)
        tree[name] = {"a": a, "b": jnp.zeros((layers, rank, out), jnp.float32)}
    return {"decoder": {"layers": tree}}


def scaled(lora: Tree, scale: float) -> Tree:
    """The tree as `Llava.apply` takes it: scale = alpha / rank folded into `b`."""
    layers = lora["decoder"]["layers"]
    return {"decoder": {"layers": {n: {"a": t["a"], "b": t["b"] * scale} for n, t in layers.items()}}}
