"""The published Gemma 3 models that take images, by name."""

from __future__ import annotations

import math

from mllm_align.models.config import DecoderConfig, LinearRope, LocalLayers
from mllm_align.models.families.gemma3.config import Gemma3Config
from mllm_align.models.families.siglip import SiglipConfig

SO400M = SiglipConfig(hidden=1152, mlp=4304, layers=27, heads=16, image_size=896, patch_size=14, pool=4)


def _preset(hidden: int, mlp: int, layers: int, heads: int, head_dim: int, scalar: int) -> Gemma3Config:
    every_sixth = tuple((i + 1) % 6 != 0 for i in range(layers))
    decoder = DecoderConfig(
        vocab=262208,
        hidden=hidden,
        mlp=mlp,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2,
        head_dim=head_dim,
        rope_theta=1e6,
        rope_scaling=LinearRope(8.0),
        local=LocalLayers(every_sixth, window=1024, rope_theta=1e4),
        image_block=SO400M.tokens,
        activation="gelu_pytorch_tanh",
        query_scale=math.sqrt(head_dim / scalar),
        scaled_embedding=True,
        norm_eps=1e-6,
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        tied=True,
        max_length=131072,
    )
    return Gemma3Config("gemma3", SO400M, decoder, 262144)


PRESETS = {
    "gemma-3-4b": _preset(2560, 10240, 34, 8, 256, scalar=256),
    "gemma-3-12b": _preset(3840, 15360, 48, 16, 256, scalar=256),
    "gemma-3-27b": _preset(5376, 21504, 62, 32, 128, scalar=168),
}
