"""Idefics3's and SmolVLM's config.json: every field that is read, its range, and its default.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_align.models.config import ModelConfig
from mllm_align.models.families import vit
from mllm_align.models.families.idefics3.vision import exact_places
from mllm_align.models.families.llama import decoder_config
from mllm_align.models.families.siglip import SiglipConfig
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

COPY = "take an Idefics3 or SmolVLM folder, or copy the file again from where it came from"

WHOLE = {
    "image_token_id": (128257, Whole(0, 1 << 31)),
    "scale_factor": (2, Whole(1, 64)),
    "tie_word_embeddings": (False, Maybe(FLAG)),
    "text_config": (None, Maybe(Object())),
    "vision_config": (None, Maybe(Object())),
}
VISION = {
    "hidden_act": ("gelu_pytorch_tanh", OneOf(("gelu_pytorch_tanh", "gelu", "quick_gelu"))),
    "hidden_size": (1152, WIDTH),
    "intermediate_size": (3072, WIDTH),
    "num_hidden_layers": (12, DEPTH),
    "num_attention_heads": (16, HEADS),
    "num_channels": (3, OneOf((3,))),
    "image_size": (224, PIXELS),
    "patch_size": (32, PIXELS),
    "layer_norm_eps": (1e-6, EPS),
}
TEXT = {"rms_norm_eps": 1e-5}  # what a folder without any text_config means


@dataclass(frozen=True)
class Idefics3Config(ModelConfig):
    vision: SiglipConfig


def parse_config(path: Path, raw: dict[str, Any]) -> Idefics3Config:
    """raw: the value of config.json. Raises InputError for a value that is out of range, and for what is
    not computed here."""
    at = f"{path}/config.json"
    whole = fields(at, raw, WHOLE, COPY)
    text = TEXT if whole["text_config"] is None else whole["text_config"]
    decoder = replace(decoder_config(at, text, COPY), tied=bool(whole["tie_word_embeddings"]))
    check_token(at, whole, "image_token_id", decoder.vocab, COPY)
    vision = _vision(at, whole["vision_config"] or {}, whole["scale_factor"])
    return Idefics3Config(raw["model_type"], vision, decoder, whole["image_token_id"])


def _vision(at: str, given: dict[str, Any], shuffle: int) -> SiglipConfig:
    config = SiglipConfig(**vit.settings(at, given, VISION, COPY), shuffle=shuffle)
    if config.side % shuffle:
        raise wrong(at, "scale_factor", shuffle, f"a divisor of the {config.side} patches a side", COPY)
    if not exact_places(config.side):
        wanted = "one whose position ids do not hang on rounding: another number of patches a side"
        raise wrong(at, "vision_config.image_size", config.image_size, wanted, COPY)
    return config
