"""The published LLaVA models by name."""

from __future__ import annotations

from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.llava.config import PINPOINTS, LlavaConfig
from mllm_align.models.families.llava.vision import ClipConfig

# CLIP ViT-L/14 at 336 pixels; features are read one layer before its last (24th).
TOWER = ClipConfig(hidden=1024, mlp=4096, layers=23, heads=16, image_size=336, patch_size=14)

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


def _anyres(decoder: DecoderConfig, image_token: int = 32000) -> LlavaConfig:
    return LlavaConfig("llava_next", TOWER, decoder, image_token, pinpoints=PINPOINTS)


LLAVA_15 = {
    "llava-1.5-7b": LlavaConfig("llava", TOWER, VICUNA_7B, 32000),
    "llava-1.5-13b": LlavaConfig("llava", TOWER, VICUNA_13B, 32000),
}
LLAVA_16 = {
    "llava-1.6-7b": _anyres(VICUNA_7B),
    "llava-1.6-mistral-7b": _anyres(MISTRAL_7B),
    "llava-1.6-13b": _anyres(VICUNA_13B),
    "llava-1.6-34b": _anyres(YI_34B, 64000),
}
