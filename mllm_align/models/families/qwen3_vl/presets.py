"""The published dense Qwen3-VL models by name."""

from __future__ import annotations

from mllm_align.models.config import DecoderConfig
from mllm_align.models.families.qwen3_vl.config import Qwen3VLConfig
from mllm_align.models.families.qwen3_vl.vision import Qwen3VisionConfig


def _preset(tower: str, hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> Qwen3VLConfig:
    decoder = DecoderConfig(
        vocab=151936,
        hidden=hidden,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        rope_theta=5e6,
        norm_eps=1e-6,
        qk_norm=True,
        rope_sections=(24, 20, 20),
        rope_interleaved=True,
        tied=tied,
        max_length=262144,
    )
    sizes = {
        "small": {"hidden": 1024, "mlp": 4096, "layers": 24, "deepstack": (5, 11, 17)},
        "large": {"hidden": 1152, "mlp": 4304, "layers": 27, "deepstack": (8, 16, 24)},
    }
    vision = Qwen3VisionConfig(heads=16, side=48, out=hidden, **sizes[tower])
    return Qwen3VLConfig("qwen3_vl", vision, decoder, 151655)


PRESETS = {
    "qwen3-vl-2b": _preset("small", 2048, 6144, 28, 16, tied=True),
    "qwen3-vl-4b": _preset("small", 2560, 9728, 36, 32, tied=True),
    "qwen3-vl-8b": _preset("large", 4096, 12288, 36, 32, tied=False),
    "qwen3-vl-32b": _preset("large", 5120, 25600, 64, 64, tied=False),
}
