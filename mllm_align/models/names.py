"""Tensors of checkpoints, and where each stands in our parameter tree: what all families share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mllm_align.models.config import DecoderConfig

SCORE_WEIGHT = "score.weight"
"""Of a reward model's head, [1, D], as transformers' sequence-classification classes call it."""
HEAD = "lm_head.weight"
Path = tuple[str, ...]
NORMS = {"norm_2": "post_attention"}
POST_NORMS = {
    "post_norm_1": "post_attention",
    "norm_2": "pre_feedforward",
    "post_norm_2": "post_feedforward",
}


@dataclass(frozen=True)
class Entry:
    """A checkpoint tensor, and the leaf (and layer of it) that holds the same numbers.

    kind: "same"; "transpose" (torch keeps [out, in], we keep [in, out]; the inputs of a convolution are
    one axis here); "patch" (a convolution [D, 3, p, p] that we run as a matrix [p * p * 3, D]); "qkv"
    (three maps of one size, [3 * out, in] or [3 * out], here [in, 3, out] or [3, out]).
    """

    name: str
    path: Path
    layer: int | None
    shape: tuple[int, ...]
    kind: Literal["same", "transpose", "patch", "qkv"]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        if self.kind == "transpose":
            return tensor.reshape(len(tensor), -1).T
        if self.kind == "qkv":
            return tensor.T.reshape(*tensor.shape[1:], 3, -1)
        if self.kind == "patch":
            return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
        return tensor

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        if self.kind == "transpose":
            return array.T.reshape(self.shape)
        if self.kind == "qkv":
            return array.reshape(-1, self.shape[0]).T.reshape(self.shape)
        if self.kind == "patch":
            out, channels, height, width = self.shape
            return array.reshape(height, width, channels, out).transpose(3, 2, 0, 1)
        return array


def same(path: Path, name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name, path, None, shape, "same")


def linear(
    path: Path, name: str, shape: tuple[int, int], bias: bool, layer: int | None = None
) -> Iterator[Entry]:
    """The tensors of a `layers.Linear`; shape: [out, in], as torch keeps it."""
    yield Entry(f"{name}.weight", (*path, "kernel"), layer, shape, "transpose")
    if bias:
        yield Entry(f"{name}.bias", (*path, "bias"), layer, shape[:1], "same")


def norm(path: Path, name: str, width: int, bias: bool, layer: int | None = None) -> Iterator[Entry]:
    """The tensors of a `layers.LayerNorm` (with a bias) or `layers.RMSNorm`."""
    yield Entry(f"{name}.weight", (*path, "scale"), layer, (width,), "same")
    if bias:
        yield Entry(f"{name}.bias", (*path, "bias"), layer, (width,), "same")


def decoder_linears(config: DecoderConfig) -> dict[str, tuple[str, tuple[int, int], bool]]:
    """Our name of each linear map of a block -> (their name, shape [out, in], has a bias)."""
    c = config
    width, small = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {
        "q": ("self_attn.q_proj", (width, c.hidden), c.qkv_bias),
        "k": ("self_attn.k_proj", (small, c.hidden), c.qkv_bias),
        "v": ("self_attn.v_proj", (small, c.hidden), c.qkv_bias),
        "o": ("self_attn.o_proj", (c.hidden, width), c.o_bias),
        "gate": ("mlp.gate_proj", (c.mlp, c.hidden), c.mlp_bias),
        "up": ("mlp.up_proj", (c.mlp, c.hidden), c.mlp_bias),
        "down": ("mlp.down_proj", (c.hidden, c.mlp), c.mlp_bias),
    }


def decoder(config: DecoderConfig, module: str) -> Iterator[Entry]:
    """The tensors of a Llama-family decoder; module: its name in the checkpoint."""
    c, root = config, ("decoder",)
    shape = (c.vocab, c.hidden)
    yield same((*root, "embedding"), f"{module}.embed_tokens.weight", shape)
    for i in range(c.layers):
        last = i == c.layers - 1  # runs on fewer rows than the others: a block of its own
        block, here = (*root, "last" if last else "layers"), f"{module}.layers.{i}"
        layer = None if last else i
        for ours, (theirs, shape_, bias) in decoder_linears(config).items():
            yield from linear((*block, ours), f"{here}.{theirs}", shape_, bias, layer)
        yield from norm((*block, "norm_1"), f"{here}.input_layernorm", c.hidden, False, layer)
        for ours, theirs in (POST_NORMS if c.post_norms else NORMS).items():
            yield from norm((*block, ours), f"{here}.{theirs}_layernorm", c.hidden, False, layer)
        for name in "qk" if c.qk_norm else "":
            path, theirs = (*block, f"norm_{name}"), f"{here}.self_attn.{name}_norm"
            yield from norm(path, theirs, c.head_dim, False, layer)
    yield from norm((*root, "norm"), f"{module}.norm", c.hidden, False)
    if not c.tied:
        yield Entry(HEAD, (*root, "head"), None, shape, "transpose")
