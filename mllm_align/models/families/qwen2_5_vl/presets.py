"""The published Qwen2.5-VL models by name."""

from __future__ import annotations

from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.qwen2_5_vl.config import Qwen25VLConfig
from mllm_align.models.families.qwen2_5_vl.vision import Qwen25VisionConfig


def _preset(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, *, vision_mlp: int, tied: bool = False
) -> Qwen25VLConfig:
    decoder = DecoderConfig(
        vocab=151936 if tied else 152064,
        hidden=hidden,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        rope_sections=(16, 24, 24),
        tied=tied,
        max_length=128000,
    )
    vision = Qwen25VisionConfig(hidden=1280, mlp=vision_mlp, layers=32, heads=16, out=hidden)
    return Qwen25VLConfig("qwen2_5_vl", vision, decoder, 151655)


PRESETS = {
    "qwen2.5-vl-3b": _preset(2048, 11008, 36, 16, 2, vision_mlp=3420, tied=True),
    "qwen2.5-vl-7b": _preset(3584, 18944, 28, 28, 4, vision_mlp=3420),
    "qwen2.5-vl-32b": _preset(5120, 27648, 64, 40, 8, vision_mlp=3456),
    "qwen2.5-vl-72b": _preset(8192, 29568, 80, 64, 8, vision_mlp=3456),
}
