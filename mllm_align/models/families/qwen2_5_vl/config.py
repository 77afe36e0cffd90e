"""Qwen2.5-VL's config.json: every field that is read, its range, and its default.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.llama import decoder_config
from mllm_align.models.families.qwen2_5_vl.vision import Qwen25VisionConfig
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
from mllm_align.models.ranges import DEPTH, PIXELS, WIDTH, Maybe, OneOf, check, check_token, fields, wrong

COPY = "take a Qwen2.5-VL folder, or copy the file again from where it came from"

TOWER = VISION | {
    "model_type": ("qwen2_5_vl_vision", OneOf(("qwen2_5_vl_vision", "qwen2_5_vl"))),
    "depth": (32, DEPTH),
    "hidden_size": (3584, WIDTH),
    "hidden_act": ("silu", OneOf(("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"))),
    "intermediate_size": (3420, WIDTH),
    "patch_size": (14, PIXELS),
    "window_size": (112, PIXELS),
    "fullatt_block_indexes": ((7, 15, 23, 31), LAYERS),
}
TEXT = {  # where it is not Qwen2's
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
}
ROPE = {
    "type": ("default", OneOf(("default", "mrope"))),
    "rope_type": ("default", OneOf(("default", "mrope"))),
    "rope_theta": (1e6, ROTARY),
    "mrope_section": ((16, 24, 24), SECTIONS),
    "partial_rotary_factor": (None, Maybe(OneOf((1, 1.0)))),
}


@dataclass(frozen=True)
class Qwen25VLConfig(QwenVLConfig):
    vision: Qwen25VisionConfig


def parse_config(path: Path, raw: dict[str, Any]) -> Qwen25VLConfig:
    """raw: the value of config.json. Raises InputError for a value that is out of range, and for what is
    not computed here."""
    at = f"{path}/config.json"
    whole = fields(at, raw, WHOLE, COPY)
    decoder = _decoder(at, raw, whole)
    check_token(at, whole, "image_token_id", decoder.vocab, COPY)
    v, settings = vision_settings(at, whole["vision_config"] or {}, TOWER, decoder, COPY)
    unit = v["patch_size"] * v["spatial_merge_size"]
    if v["window_size"] < unit:
        wanted = f"at least the {unit} pixels of a cell of {v['spatial_merge_size']} patches a side"
        raise wrong(at, "vision_config.window_size", v["window_size"], wanted, COPY)
    full = tuple(sorted(set(v["fullatt_block_indexes"])))
    vision = Qwen25VisionConfig(**settings, window=v["window_size"] // unit, full=full)
    return Qwen25VLConfig(raw["model_type"], vision, decoder, whole["image_token_id"])


def _decoder(at: str, raw: dict[str, Any], whole: dict[str, Any]) -> DecoderConfig:
    """Newer folders have it in text_config, published ones beside the rest."""
    text, under = whole["text_config"], "text_config."
    if text is None:
        text, under = raw, ""
    else:
        named = text.get("model_type", "qwen2_5_vl_text")
        check(at, f"{under}model_type", named, OneOf(("qwen2_5_vl_text",)), COPY)
    rope = rope_fields(at, text, ROPE, COPY, under)
    plain = {"model_type": "qwen2", "rope_theta": rope["rope_theta"], "rope_scaling": None}
    given = TEXT | text | plain | {"rope_parameters": None}
    decoder = decoder_config(at, given, COPY, under)
    if decoder.head_dim * decoder.heads != decoder.hidden:
        wanted = f"hidden_size / num_attention_heads, {decoder.hidden} / {decoder.heads}"
        raise wrong(at, f"{under}head_dim", decoder.head_dim, wanted, COPY)
    sections = tuple(rope["mrope_section"])
    if sum(sections) != decoder.head_dim // 2:
        wanted = f"three numbers that add up to half of a head's size, {decoder.head_dim // 2}"
        raise wrong(at, f"{under}mrope_section", list(sections), wanted, COPY)
    tied = bool(whole["tie_word_embeddings"] or decoder.tied)
    return replace(decoder, rope_sections=sections, tied=tied)
