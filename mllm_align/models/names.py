"""How tensors are called in published LLaVA folders, and where each stands in our parameter tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_align.models.config import LlavaConfig

EMBEDDING = "language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


def canonical(name: str) -> str:
    """One name for a tensor, whichever layout of transformers wrote it.

    llava-hf:  language_model.model.layers.0...   language_model.lm_head   vision_tower.vision_model...
    4.52:      model.language_model.layers.0...   lm_head                  model.vision_tower...
    5.x:       either, with or without `vision_model`
    """
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


@dataclass(frozen=True)
class Entry:
    """A checkpoint tensor, and the leaf (and layer of it) that holds the same numbers.

    kind: "same"; "transpose" (torch keeps [out, in], we keep [in, out]); "patch" (a convolution
    [D, 3, p, p] that we run as a matrix [p * p * 3, D]).
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    kind: Literal["same", "transpose", "patch"]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        if self.kind == "transpose":
            return tensor.T
        if self.kind == "patch":
            return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
        return tensor

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        if self.kind == "transpose":
            return array.T
        if self.kind == "patch":
            out, channels, height, width = self.shape
            return array.reshape(height, width, channels, out).transpose(3, 2, 0, 1)
        return array


def entries(config: LlavaConfig) -> Iterator[Entry]:
    """Every tensor that the forward pass reads, under its canonical name.

    What a folder holds beyond these (vision layers after the feature layer, old rotary tables) is not
    needed to compute, and export copies it as it is.
    """
    yield from _vision(config)
    yield from _linear(
        ("projector", "linear_1"),
        "multi_modal_projector.linear_1",
        (config.decoder.hidden, config.vision.hidden),
        config.projector_bias,
    )
    yield from _linear(
        ("projector", "linear_2"),
        "multi_modal_projector.linear_2",
        (config.decoder.hidden, config.decoder.hidden),
        config.projector_bias,
    )
    if config.anyres:
        yield Entry("image_newline", ("image_newline",), None, (config.decoder.hidden,), "same")
    yield from _decoder(config)


def _linear(path, name, shape, bias, layer=None) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (*path, "kernel"), layer, shape, "transpose")
    if bias:
        yield Entry(f"{name}.bias", (*path, "bias"), layer, shape[:1], "same")


def _norm(path, name, width, bias, layer=None) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", (*path, "scale"), layer, (width,), "same")
    if bias:
        yield Entry(f"{name}.bias", (*path, "bias"), layer, (width,), "same")


def _vision(config: LlavaConfig) -> Iterator[Entry]:
    c, tower, name = config.vision, ("vision_tower",), "vision_tower"
    embeddings = f"{name}.embeddings"
    yield Entry(f"{embeddings}.class_embedding", (*tower, "class_embedding"), None, (c.hidden,), "same")
    yield Entry(
        f"{embeddings}.patch_embedding.weight",
        (*tower, "patch_embedding", "kernel"),
        None,
        (c.hidden, 3, c.patch_size, c.patch_size),
        "patch",
    )
    yield Entry(
        f"{embeddings}.position_embedding.weight",
        (*tower, "position_embedding"),
        None,
        (c.side**2 + 1, c.hidden),
        "same",
    )
    yield from _norm((*tower, "pre_norm"), f"{name}.pre_layrnorm", c.hidden, True)
    for i in range(c.layers):
        block, here = (*tower, "layers"), f"{name}.encoder.layers.{i}"
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
            shape = (c.hidden, c.hidden)
            yield from _linear((*block, ours), f"{here}.self_attn.{theirs}", shape, True, i)
        yield from _linear((*block, "fc_1"), f"{here}.mlp.fc1", (c.mlp, c.hidden), True, i)
        yield from _linear((*block, "fc_2"), f"{here}.mlp.fc2", (c.hidden, c.mlp), True, i)
        yield from _norm((*block, "norm_1"), f"{here}.layer_norm1", c.hidden, True, i)
        yield from _norm((*block, "norm_2"), f"{here}.layer_norm2", c.hidden, True, i)


def decoder_linears(config: LlavaConfig) -> dict[str, tuple[str, tuple[int, int], bool]]:
    """Our name of each linear map of a block -> (their name, shape [out, in], has a bias)."""
    c = config.decoder
    width, small = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "q": ("self_attn.q_proj", (width, c.hidden), c.attention_bias),
        "k": ("self_attn.k_proj", (small, c.hidden), c.attention_bias),
        "v": ("self_attn.v_proj", (small, c.hidden), c.attention_bias),
        "o": ("self_attn.o_proj", (c.hidden, width), c.attention_bias),
        "gate": ("mlp.gate_proj", (c.mlp, c.hidden), c.mlp_bias),
        "up": ("mlp.up_proj", (c.mlp, c.hidden), c.mlp_bias),
        "down": ("mlp.down_proj", (c.hidden, c.mlp), c.mlp_bias),
    }


def _decoder(config: LlavaConfig) -> Iterator[Entry]:
    c, root, name = config.decoder, ("decoder",), "language_model"
    shape = (c.vocab, c.hidden)
    yield Entry(EMBEDDING, (*root, "embedding"), None, shape, "same")
    for i in range(c.layers):
        last = i == c.layers - 1  # runs on fewer rows than the others: a block of its own
        block, here = (*root, "last" if last else "layers"), f"{name}.layers.{i}"
        layer = None if last else i
        for ours, (theirs, shape_, bias) in decoder_linears(config).items():
            yield from _linear((*block, ours), f"{here}.{theirs}", shape_, bias, layer)
        yield from _norm((*block, "norm_1"), f"{here}.input_layernorm", c.hidden, False, layer)
        yield from _norm((*block, "norm_2"), f"{here}.post_attention_layernorm", c.hidden, False, layer)
    yield from _norm((*root, "norm"), f"{name}.norm", c.hidden, False)
    if not c.tied:
        yield Entry(HEAD, (*root, "head"), None, shape, "transpose")
