"""LLaVA's config.json: every field that is read, its range, and what an absent one stands for.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_align.models.config import ModelConfig
from mllm_align.models.families import vit
from mllm_align.models.families.llama import decoder_config
from mllm_align.models.families.llava.vision import ClipConfig
from mllm_align.models.ranges import (
    DEPTH,
    EPS,
    FLAG,
    HEADS,
    PIXELS,
    WIDTH,
    Listed,
    Maybe,
    Object,
    OneOf,
    Whole,
    check_token,
    fields,
    wrong,
)

COPY = "take a LLaVA 1.5 or 1.6 folder, or copy the file again from where it came from"

GELU = OneOf(("gelu", "quick_gelu"))
TILES = 64  # most of them along one side of an AnyRes canvas

CANVASES = Maybe(Listed(Whole(1, 1024), Listed(Whole(2, 2), Whole(1, TILES * PIXELS.high))))

WHOLE = {
    "image_token_index": (32000, Whole(0, 1 << 31)),
    "projector_hidden_act": ("gelu", GELU),
    "vision_feature_select_strategy": ("default", OneOf(("default", "full"))),
    "multimodal_projector_bias": (True, FLAG),
    "tie_word_embeddings": (False, Maybe(FLAG)),
    "text_config": (None, Maybe(Object())),
    "vision_config": (None, Maybe(Object())),
    "image_grid_pinpoints": (None, CANVASES),
}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
VISION = {
    "model_type": ("clip_vision_model", OneOf(("clip_vision_model",))),
    "hidden_act": ("quick_gelu", GELU),
    "hidden_size": (768, WIDTH),
    "intermediate_size": (3072, WIDTH),
    "num_hidden_layers": (12, DEPTH),
    "num_attention_heads": (12, HEADS),
    "num_channels": (3, OneOf((3,))),
    "image_size": (224, PIXELS),
    "patch_size": (32, PIXELS),
    "layer_norm_eps": (1e-5, EPS),
}
# A folder without any vision_config means CLIP ViT-L/14 at 336 pixels.
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class LlavaLikeConfig(ModelConfig):
    """What all LLaVAs have, whatever their tower is."""

    projector_activation: str = "gelu"
    projector_bias: bool = True
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Canvas sizes (height, width) in pixels that an AnyRes image may be fitted into."""

    @property
    def newline(self) -> bool:
        return bool(self.pinpoints)


@dataclass(frozen=True)
class LlavaConfig(LlavaLikeConfig):
    """LLaVA 1.5 (`pinpoints` empty: one square tile an image) or 1.6 (AnyRes tiles and `image_newline`)."""

    vision: ClipConfig


def parse_config(path: Path, raw: dict[str, Any]) -> LlavaConfig:
    """raw: the value of config.json. Raises InputError for a value that is out of range, and for what is
    not computed here."""
    at, family = f"{path}/config.json", raw["model_type"]
    whole = fields(at, raw, WHOLE, COPY)
    anyres = family == "llava_next"
    if anyres and whole["vision_feature_select_strategy"] != "default":
        strategy = whole["vision_feature_select_strategy"]
        raise wrong(at, "vision_feature_select_strategy", strategy, "'default' for LLaVA 1.6", COPY)
    vision = _vision(at, raw, whole)
    decoder = decoder_config(at, whole["text_config"] or {}, COPY)
    # transformers takes the decoder's own flag in LLaVA 1.5 alone
    decoder = replace(decoder, tied=bool(whole["tie_word_embeddings"] or (decoder.tied and not anyres)))
    check_token(at, whole, "image_token_index", decoder.vocab, COPY)
    return LlavaConfig(
        family=family,
        vision=vision,
        decoder=decoder,
        image_token=whole["image_token_index"],
        projector_activation=whole["projector_hidden_act"],
        projector_bias=whole["multimodal_projector_bias"],
        pinpoints=canvases(at, whole["image_grid_pinpoints"] or PINPOINTS, vision.image_size, COPY)
        if anyres
        else (),
    )


def _vision(at: str, raw: dict[str, Any], whole: dict[str, Any]) -> ClipConfig:
    given = CLIP_L if whole["vision_config"] is None else whole["vision_config"]
    tower = vit.settings(at, given, VISION, COPY)
    layer = raw.get("vision_feature_layer", -2)
    tower["layers"] = vit.feature_layer(at, layer, tower["layers"], COPY)
    return ClipConfig(**tower, keep_class_token=whole["vision_feature_select_strategy"] == "full")


def canvases(at: str, given: Any, tile: int, remedy: str) -> tuple[tuple[int, int], ...]:
    """AnyRes canvases are cut into tiles, so that their sides are multiples of a tile's."""
    pinpoints = tuple((height, width) for height, width in given)
    bad = [p for p in pinpoints if any(side % tile or side > TILES * tile for side in p)]
    if bad:
        wanted = f"multiples of the tile's {tile} pixels, {TILES} tiles a side at most"
        raise wrong(at, "image_grid_pinpoints", list(bad[0]), wanted, remedy)
    return pinpoints
