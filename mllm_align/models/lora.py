"""LoRA as a parameter tree beside the frozen base (Hu et al. 2021)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from mllm_align.models.config import DecoderConfig
from mllm_align.models.names import decoder_linears

Tree = dict[str, Any]


def init_lora(config: DecoderConfig, rank: int, targets: tuple[str, ...], key: jax.Array) -> Tree:
    """float32 `a` [in, rank] (uniform, as torch's linear layers) and `b` [rank, out] (0) of each target.

    The tree has the shape of the model's parameters: decoder / layers (stacked) and last / target / {a, b}.
    """
    shapes = decoder_linears(config)
    stacked = config.layers - 1
    tree: Tree = {"last": {}} | ({"layers": {}} if stacked else {})
    for name, place in zip(targets, jax.random.split(key, len(targets)), strict=True):
        out, inner = shapes[name][1]
        bound = 1 / math.sqrt(inner)
        whole = (stacked + 1, inner, rank)
        a = jax.random.uniform(place, whole, jnp.float32, -bound, bound)
        tree["last"][name] = {"a": a[-1], "b": jnp.zeros((rank, out), jnp.float32)}
        if stacked:
            tree["layers"][name] = {"a": a[:-1], "b": jnp.zeros((stacked, rank, out), jnp.float32)}
    return {"decoder": tree}


def scaled(lora: Tree, scale: float) -> Tree:
    """The tree as `VisionLanguageModel.apply` takes it: scale = alpha / rank folded into `b`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * scale if path[-1].key == "b" else leaf, lora
    )
