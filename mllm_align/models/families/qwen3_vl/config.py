"""Qwen3-VL's config.json: every field that is read, its range, and its default.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.qwen3_vl.vision import Qwen3VisionConfig
from mllm_align.models.families.qwen_vl.config import (
    LAYERS,
    ROTARY,
    SECTIONS,
    VISION,
    WHOLE,
    QwenVLConfig,
    rope_fields,
    vision_settings,
)
from mllm_align.models.ranges import (
    DEPTH,
    EPS,
    FLAG,
    HEADS,
    PIXELS,
    WIDTH,
    Maybe,
    Object,
    OneOf,
    Whole,
    check_token,
    fields,
    wrong,
)

COPY = (
    "take a Qwen3-VL folder (dense, no mixture of experts), or copy the file again from where it came from"
)

TOWER = VISION | {
    "model_type": ("qwen3_vl_vision", OneOf(("qwen3_vl_vision", "qwen3_vl"))),
    "depth": (27, DEPTH),
    "hidden_size": (1152, WIDTH),
    "hidden_act": ("gelu_pytorch_tanh", OneOf(("gelu_pytorch_tanh", "gelu", "quick_gelu"))),
    "intermediate_size": (4304, WIDTH),
    "patch_size": (16, PIXELS),
    "num_position_embeddings": (2304, WIDTH),
    "deepstack_visual_indexes": ((8, 16, 24), LAYERS),
}
TEXT = {
    "model_type": ("qwen3_vl_text", OneOf(("qwen3_vl_text",))),
    "hidden_act": ("silu", OneOf(("silu",))),
    "vocab_size": (151936, WIDTH),
    "hidden_size": (4096, WIDTH),
    "intermediate_size": (22016, WIDTH),
    "num_hidden_layers": (32, DEPTH),
    "num_attention_heads": (32, HEADS),
    "num_key_value_heads": (32, Maybe(HEADS)),
    "head_dim": (128, Whole(2, 1 << 14)),
    "max_position_embeddings": (128000, Whole(1, 1 << 31)),
    "rms_norm_eps": (1e-6, EPS),
    "attention_bias": (False, FLAG),
    "rope_theta": (None, Maybe(ROTARY)),
    "rope_parameters": (None, Maybe(Object())),
    "rope_scaling": (None, Maybe(Object())),
}
ROPE = {
    "type": ("default", OneOf(("default",))),
    "rope_type": ("default", OneOf(("default",))),
    "rope_theta": (500000.0, ROTARY),
    "mrope_section": ((24, 20, 20), SECTIONS),
    "mrope_interleaved": (True, OneOf((True,))),
    "partial_rotary_factor": (None, Maybe(OneOf((1, 1.0)))),
}


@dataclass(frozen=True)
class Qwen3VLConfig(QwenVLConfig):
    vision: Qwen3VisionConfig


def parse_config(path: Path, raw: dict[str, Any]) -> Qwen3VLConfig:
    """raw: the value of config.json. Raises InputError for a value that is out of range, and for what is
    not computed here."""
    at = f"{path}/config.json"
    whole = fields(at, raw, WHOLE, COPY)
    decoder = _decoder(at, whole["text_config"] or {}, bool(whole["tie_word_embeddings"]))
    check_token(at, whole, "image_token_id", decoder.vocab, COPY)
    vision = _vision(at, whole["vision_config"] or {}, decoder)
    return Qwen3VLConfig(raw["model_type"], vision, decoder, whole["image_token_id"])


def _decoder(at: str, given: dict[str, Any], tied: bool) -> DecoderConfig:
    under = "text_config."
    t = fields(at, given, TEXT, COPY, under)
    heads, size = t["num_attention_heads"], t["head_dim"]
    kv_heads = t["num_key_value_heads"] or heads
    if heads % kv_heads:
        wanted = f"a divisor of the {heads} attention heads"
        raise wrong(at, f"{under}num_key_value_heads", kv_heads, wanted, COPY)
    if size % 2:
        raise wrong(at, f"{under}head_dim", size, "an even number", COPY)
    rope = rope_fields(at, t, ROPE, COPY, under)
    return DecoderConfig(
        vocab=t["vocab_size"],
        hidden=t["hidden_size"],
        mlp=t["intermediate_size"],
        layers=t["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=float(t["rms_norm_eps"]),
        qkv_bias=t["attention_bias"],
        o_bias=t["attention_bias"],
        qk_norm=True,
        rope_sections=tuple(rope["mrope_section"]),
        rope_interleaved=True,
        tied=tied,
        max_length=t["max_position_embeddings"],
    )


def _vision(at: str, given: dict[str, Any], decoder: DecoderConfig) -> Qwen3VisionConfig:
    under = "vision_config."
    v, settings = vision_settings(at, given, TOWER, decoder, COPY)
    side, deep = math.isqrt(v["num_position_embeddings"]), tuple(v["deepstack_visual_indexes"])
    if side**2 != v["num_position_embeddings"]:
        raise wrong(at, f"{under}num_position_embeddings", v["num_position_embeddings"], "a square", COPY)
    if list(deep) != sorted(set(deep)) or any(layer >= v["depth"] for layer in deep):
        wanted = f"rising numbers of the {v['depth']} vision layers"
        raise wrong(at, f"{under}deepstack_visual_indexes", list(deep), wanted, COPY)
    if len(deep) >= decoder.layers:
        wanted = f"fewer than the decoder's {decoder.layers} layers"
        raise wrong(at, f"{under}deepstack_visual_indexes", list(deep), wanted, COPY)
    return Qwen3VisionConfig(**settings, side=side, deepstack=deep)
