"""InternVL's config.json: every field that is read, its range, and its default.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_align.models.config import ModelConfig
from mllm_align.models.families import vit
from mllm_align.models.families.internvl.vision import InternVitConfig
from mllm_align.models.families.llama import decoder_config
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

COPY = "take an InternVL3 folder whose name ends in -hf, or copy the file again from where it came from"

GELU = OneOf(("gelu", "gelu_pytorch_tanh", "quick_gelu"))
WHOLE = {
    "image_token_id": (151667, Whole(0, 1 << 31)),
    "downsample_ratio": (0.5, OneOf((0.5, 0.25, 1.0, 1))),
    "projector_hidden_act": ("gelu", GELU),
    "vision_feature_select_strategy": ("default", OneOf(("default",))),
    "tie_word_embeddings": (True, Maybe(FLAG)),
    "text_config": (None, Maybe(Object())),
    "vision_config": (None, Maybe(Object())),
}
VISION = {
    "model_type": ("internvl_vision", OneOf(("internvl_vision",))),
    "hidden_act": ("gelu", GELU),
    "hidden_size": (1024, WIDTH),
    "intermediate_size": (4096, WIDTH),
    "num_hidden_layers": (24, DEPTH),
    "num_attention_heads": (16, HEADS),
    "num_channels": (3, OneOf((3,))),
    "image_size": (448, PIXELS),
    "patch_size": (14, PIXELS),
    "layer_norm_eps": (1e-6, EPS),
}
BLOCKS = {
    "attention_bias": (False, FLAG),
    "use_qk_norm": (False, FLAG),
    "norm_type": ("layer_norm", OneOf(("layer_norm", "rms_norm"))),
    "use_absolute_position_embeddings": (True, OneOf((True,))),
    "use_mean_pooling": (True, OneOf((True,))),  # else features pass another norm
}


@dataclass(frozen=True)
class InternVLConfig(ModelConfig):
    vision: InternVitConfig
    projector_activation: str = "gelu"


def parse_config(path: Path, raw: dict[str, Any]) -> InternVLConfig:
    """raw: the value of config.json. Raises InputError for a value that is out of range, and for what is
    not computed here."""
    at = f"{path}/config.json"
    whole = fields(at, raw, WHOLE, COPY)
    decoder = decoder_config(at, {"model_type": "qwen2", **(whole["text_config"] or {})}, COPY)
    decoder = replace(decoder, tied=bool(whole["tie_word_embeddings"]))
    check_token(at, whole, "image_token_id", decoder.vocab, COPY)
    return InternVLConfig(
        family=raw["model_type"],
        vision=_vision(at, raw, whole),
        decoder=decoder,
        image_token=whole["image_token_id"],
        projector_activation=whole["projector_hidden_act"],
    )


def _vision(at: str, raw: dict[str, Any], whole: dict[str, Any]) -> InternVitConfig:
    given = dict(whole["vision_config"] or {})
    for name in ("image_size", "patch_size"):  # published as two equal sides
        match given.get(name):
            case [height, width] if height == width:
                given[name] = height
    tower = vit.settings(at, given, VISION, COPY)
    blocks = fields(at, given, BLOCKS, COPY, "vision_config.")
    layer = raw.get("vision_feature_layer", -1)
    tower["layers"] = vit.feature_layer(at, layer, tower["layers"], COPY)
    config = InternVitConfig(
        **tower,
        qkv_bias=blocks["attention_bias"],
        qk_norm=blocks["use_qk_norm"],
        rms_norm=blocks["norm_type"] == "rms_norm",
        shuffle=round(1 / whole["downsample_ratio"]),
    )
    if config.side % config.shuffle:
        wanted = f"1 / a divisor of the {config.side} patches a side"
        raise wrong(at, "downsample_ratio", whole["downsample_ratio"], wanted, COPY)
    return config
