"""The published LLaVA-OneVision models by name."""

from __future__ import annotations

from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.onevision.config import OneVisionConfig
from mllm_align.models.families.siglip import SiglipConfig

# SigLIP-SO400M at 384 pixels without its last layer and norm.
TOWER = SiglipConfig(
    hidden=1152, mlp=4304, layers=26, heads=16, image_size=384, patch_size=14, post_norm=False
)
IMAGE = 151646


def _qwen2(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab=vocab,
        hidden=hidden,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        rope_theta=1e6,
        qkv_bias=True,
        tied=vocab == SMALL,
        max_length=32768,
    )


SMALL, LARGE = 152000, 152128  # rows of the embedding table; the small one is tied

PRESETS = {
    f"llava-onevision-{name}": OneVisionConfig("llava_onevision", TOWER, decoder, IMAGE)
    for name, decoder in {
        "0.5b": _qwen2(SMALL, 896, 4864, 24, 14, 2),
        "7b": _qwen2(LARGE, 3584, 18944, 28, 28, 4),
        "72b": _qwen2(LARGE, 8192, 29568, 80, 64, 8),
    }.items()
}
