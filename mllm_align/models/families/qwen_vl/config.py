"""What config.json of Qwen2.5-VL and Qwen3-VL has in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm_align.models.config import DecoderConfig, ModelConfig
from mllm_align.models.families.qwen_vl.vision import THETA, QwenVisionConfig
from mllm_align.models.ranges import (
    DEPTH,
    FLAG,
    HEADS,
    WIDTH,
    Between,
    Listed,
    Maybe,
    Object,
    OneOf,
    Whole,
    check,
    fields,
    wrong,
)

WHOLE = {
    "image_token_id": (151655, Whole(0, 1 << 31)),
    "tie_word_embeddings": (False, Maybe(FLAG)),
    "text_config": (None, Maybe(Object())),
    "vision_config": (None, Maybe(Object())),
}
VISION = {
    "num_heads": (16, HEADS),
    "in_channels": (3, OneOf((3,))),
    "spatial_merge_size": (2, Whole(1, 16)),
    "temporal_patch_size": (2, Whole(1, 16)),
    "out_hidden_size": (3584, WIDTH),
    "rope_parameters": (None, Maybe(Object())),
}
"""What has one default in all of them."""
AXIAL = {
    "rope_type": ("axial", OneOf(("axial",))),
    "rope_theta": (THETA, OneOf((THETA, int(THETA)))),
}
LAYERS = Listed(Whole(0, DEPTH.high), Whole(0, DEPTH.high))
ROTARY = Between(0, 1e18)
SECTIONS = Listed(Whole(3, 3), Whole(1, 1 << 13))


@dataclass(frozen=True)
class QwenVLConfig(ModelConfig):
    vision: QwenVisionConfig

    @property
    def joined(self) -> bool:
        return True


def rope_fields(
    at: str, text: Mapping[str, Any], table: Mapping[str, Any], remedy: str, under: str
) -> dict[str, Any]:
    """Of the decoder: newer folders have all of it in rope_parameters, older ones theta beside
    rope_scaling."""
    name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    given = check(at, under + name, text.get(name), Maybe(Object()), remedy) or {}
    outer = {} if text.get("rope_theta") is None else {"rope_theta": text["rope_theta"]}
    return fields(at, outer | given, table, remedy, f"{under}{name}.")


def vision_settings(
    at: str, given: dict[str, Any], table: Mapping[str, Any], decoder: DecoderConfig, remedy: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(all fields of config.json's vision_config, those of a `QwenVisionConfig`).

    table: `VISION` and the family's own. Raises InputError for values out of their ranges, and for sizes
    that do not go together.
    """
    under = "vision_config."
    v = fields(at, given, table, remedy, under)
    fields(at, v["rope_parameters"] or {}, AXIAL, remedy, f"{under}rope_parameters.")
    width, heads = v["hidden_size"], v["num_heads"]
    if width % (4 * heads):
        wanted = f"one of which the width {width} is a multiple by 4, for rotation by two axes"
        raise wrong(at, f"{under}num_heads", heads, wanted, remedy)
    if v["out_hidden_size"] != decoder.hidden:
        wanted = f"text_config.hidden_size, which is {decoder.hidden}"
        raise wrong(at, f"{under}out_hidden_size", v["out_hidden_size"], wanted, remedy)
    return v, {
        "hidden": width,
        "mlp": v["intermediate_size"],
        "layers": v["depth"],
        "heads": heads,
        "out": decoder.hidden,
        "patch_size": v["patch_size"],
        "frames": v["temporal_patch_size"],
        "merge": v["spatial_merge_size"],
        "activation": v["hidden_act"],
    }
