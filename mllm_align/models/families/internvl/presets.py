"""The published InternVL3 and InternVL3.5 models by name."""

from __future__ import annotations

from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.internvl.config import InternVLConfig
from mllm_align.models.families.internvl.vision import InternVitConfig

SMALL = InternVitConfig(hidden=1024, mlp=4096, layers=24, heads=16, image_size=448, patch_size=14)
LARGE = InternVitConfig(
    hidden=3200,
    mlp=12800,
    layers=45,
    heads=25,
    image_size=448,
    patch_size=14,
    qkv_bias=False,
    qk_norm=True,
    rms_norm=True,
)


def _qwen(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, qwen3: bool) -> DecoderConfig:
    return DecoderConfig(
        vocab=151936 if qwen3 else 151674,
        hidden=hidden,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128 if qwen3 else hidden // heads,
        rope_theta=1e6,
        qkv_bias=not qwen3,
        qk_norm=qwen3,
        max_length=40960 if qwen3 else 32768,
    )


PRESETS = {
    f"internvl{version}-{size}": InternVLConfig("internvl", tower, _qwen(*numbers, version == "3.5"), image)
    for version, size, tower, image, numbers in (
        ("3", "1b", SMALL, 151667, (896, 4864, 24, 14, 2)),
        ("3", "2b", SMALL, 151667, (1536, 8960, 28, 12, 2)),
        ("3", "8b", SMALL, 151667, (3584, 18944, 28, 28, 4)),
        ("3", "14b", SMALL, 151667, (5120, 13824, 48, 40, 8)),
        ("3", "38b", LARGE, 151667, (5120, 27648, 64, 40, 8)),
        ("3", "78b", LARGE, 151667, (8192, 29568, 80, 64, 8)),
        ("3.5", "1b", SMALL, 151671, (1024, 3072, 28, 16, 8)),
        ("3.5", "2b", SMALL, 151671, (2048, 6144, 28, 16, 8)),
        ("3.5", "4b", SMALL, 151671, (2560, 9728, 36, 32, 8)),
        ("3.5", "8b", SMALL, 151671, (4096, 12288, 36, 32, 8)),
        ("3.5", "14b", SMALL, 151671, (5120, 17408, 40, 40, 8)),
        ("3.5", "38b", LARGE, 151671, (5120, 25600, 64, 64, 8)),
    )
}
