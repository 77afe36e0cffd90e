"""The published LLaVA models by name, for what needs a model's shape and not its weights."""

from __future__ import annotations

from pathlib import Path

from mllm_align.errors import InputError
from mllm_align.models.config import DecoderConfig, LlavaConfig, VisionConfig
from mllm_align.models.sources import config_of

# CLIP ViT-L/14 at 336 pixels; features are read one layer before its last (24th).
TOWER = VisionConfig(hidden=1024, mlp=4096, layers=23, heads=16, image_size=336, patch_size=14)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

VICUNA_7B = DecoderConfig(
    vocab=32064, hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=32, head_dim=128, norm_eps=1e-5
)
VICUNA_13B = DecoderConfig(
    vocab=32064, hidden=5120, mlp=13824, layers=40, heads=40, kv_heads=40, head_dim=128, norm_eps=1e-5
)
MISTRAL_7B = DecoderConfig(
    vocab=32064,
    hidden=4096,
    mlp=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-5,
    max_length=32768,
)
YI_34B = DecoderConfig(
    vocab=64064,
    hidden=7168,
    mlp=20480,
    layers=60,
    heads=56,
    kv_heads=8,
    head_dim=128,
    rope_theta=5e6,
    norm_eps=1e-5,
)

PRESETS = {
    "llava-1.5-7b": LlavaConfig(TOWER, VICUNA_7B, image_token=32000),
    "llava-1.5-13b": LlavaConfig(TOWER, VICUNA_13B, image_token=32000),
    "llava-1.6-7b": LlavaConfig(TOWER, VICUNA_7B, image_token=32000, pinpoints=PINPOINTS),
    "llava-1.6-mistral-7b": LlavaConfig(TOWER, MISTRAL_7B, image_token=32000, pinpoints=PINPOINTS),
    "llava-1.6-13b": LlavaConfig(TOWER, VICUNA_13B, image_token=32000, pinpoints=PINPOINTS),
    "llava-1.6-34b": LlavaConfig(TOWER, YI_34B, image_token=64000, pinpoints=PINPOINTS),
}


def resolve(model: str | Path) -> LlavaConfig:
    """A preset's name, or a model as `sources.open_model` takes it; only its configuration is read.

    Raises InputError where it is neither.
    """
    name = str(model)
    if name in PRESETS:
        return PRESETS[name]
    if not Path(model).is_dir() and "/" not in name:
        raise InputError(f"model {name!r} is no folder and none of {', '.join(PRESETS)}")
    return config_of(model)
