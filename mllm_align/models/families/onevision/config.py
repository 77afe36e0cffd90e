"""LLaVA-OneVision's config.json: every field that is read, its range, and its default.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_align.models.families import vit
from mllm_align.models.families.llama import decoder_config
from mllm_align.models.families.llava.config import CANVASES, GELU, LlavaLikeConfig, canvases
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
)

COPY = "take a LLaVA-OneVision folder, or copy the file again from where it came from"


class AnyResMax:
    """anyres_max_N: an image's tiles are pooled to about N tiles' embeddings."""

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch("anyres_max_[1-9][0-9]{0,3}", value) is not None

    def __str__(self) -> str:
        return "'anyres_max_' and a number"


WHOLE = {
    "image_token_index": (151646, Whole(0, 1 << 31)),
    "projector_hidden_act": ("gelu", GELU),
    "vision_feature_select_strategy": ("full", OneOf(("full",))),
    "vision_aspect_ratio": ("anyres_max_9", AnyResMax()),
    "multimodal_projector_bias": (True, FLAG),
    "tie_word_embeddings": (False, Maybe(FLAG)),
    "text_config": (None, Maybe(Object())),
    "vision_config": (None, Maybe(Object())),
    "image_grid_pinpoints": (None, CANVASES),
}
PINPOINTS = tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7))
VISION = {
    "model_type": ("siglip_vision_model", OneOf(("siglip_vision_model",))),
    "hidden_act": ("gelu_pytorch_tanh", OneOf(("gelu_pytorch_tanh", "gelu", "quick_gelu"))),
    "hidden_size": (768, WIDTH),
    "intermediate_size": (3072, WIDTH),
    "num_hidden_layers": (12, DEPTH),
    "num_attention_heads": (12, HEADS),
    "num_channels": (3, OneOf((3,))),
    "image_size": (224, PIXELS),
    "patch_size": (16, PIXELS),
    "layer_norm_eps": (1e-6, EPS),
}
# A folder without any vision_config means SigLIP-SO400M at 384 pixels, without its last layer.
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@dataclass(frozen=True)
class OneVisionConfig(LlavaLikeConfig):
    vision: SiglipConfig
    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS
    most: int = 9
    """Tiles whose embeddings an image of more is pooled to."""

    @property
    def taps(self) -> int:
        return 3  # four neighbours


def parse_config(path: Path, raw: dict[str, Any]) -> OneVisionConfig:
    """raw: the value of config.json. Raises InputError for a value that is out of range, and for what is
    not computed here."""
    at = f"{path}/config.json"
    whole = fields(at, raw, WHOLE, COPY)
    decoder = decoder_config(at, {"model_type": "qwen2", **(whole["text_config"] or {})}, COPY)
    decoder = replace(decoder, tied=bool(whole["tie_word_embeddings"] or decoder.tied))
    check_token(at, whole, "image_token_index", decoder.vocab, COPY)
    tower = vit.settings(at, whole["vision_config"] or SO400M, VISION, COPY)
    layer = raw.get("vision_feature_layer", -1)
    tower["layers"] = vit.feature_layer(at, layer, tower["layers"], COPY)
    return OneVisionConfig(
        family=raw["model_type"],
        vision=SiglipConfig(**tower, post_norm=False),
        decoder=decoder,
        image_token=whole["image_token_index"],
        projector_activation=whole["projector_hidden_act"],
        projector_bias=whole["multimodal_projector_bias"],
        pinpoints=canvases(at, whole["image_grid_pinpoints"] or PINPOINTS, tower["image_size"], COPY),
        most=int(whole["vision_aspect_ratio"].removeprefix("anyres_max_")),
    )
