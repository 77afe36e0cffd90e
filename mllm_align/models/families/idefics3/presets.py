"""The published SmolVLM models and Idefics3 by name."""

from __future__ import annotations

from dataclasses import replace

from mllm_align.models.config import DecoderConfig, Llama3Rope
from mllm_align.models.families.idefics3.config import Idefics3Config
from mllm_align.models.families.siglip import SiglipConfig

BASE = SiglipConfig(hidden=768, mlp=3072, layers=12, heads=12, image_size=512, patch_size=16, shuffle=4)
SO400M = SiglipConfig(hidden=1152, mlp=4304, layers=27, heads=16, image_size=384, patch_size=14, shuffle=3)

SMOLLM2_135M = DecoderConfig(
    vocab=49280,
    hidden=576,
    mlp=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    max_length=8192,
)
SMOLLM2_360M = DecoderConfig(
    vocab=49280,
    hidden=960,
    mlp=2560,
    layers=32,
    heads=15,
    kv_heads=5,
    head_dim=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    max_length=8192,
)
SMOLLM2_1_7B = DecoderConfig(
    vocab=49155,
    hidden=2048,
    mlp=8192,
    layers=24,
    heads=32,
    kv_heads=32,
    head_dim=64,
    rope_theta=273768.0,
    norm_eps=1e-5,
    max_length=16384,
)
LLAMA_8B = DecoderConfig(
    vocab=128259,
    hidden=4096,
    mlp=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    rope_theta=5e5,
    rope_scaling=Llama3Rope(factor=8.0, low=1.0, high=4.0, original=8192),
    norm_eps=1e-5,
    max_length=131072,
)

PRESETS = {
    "smolvlm-256m": Idefics3Config("idefics3", BASE, SMOLLM2_135M, 49190),
    "smolvlm-500m": Idefics3Config("idefics3", BASE, SMOLLM2_360M, 49190),
    "smolvlm-2.2b": Idefics3Config("idefics3", SO400M, SMOLLM2_1_7B, 49153),
    "idefics3-8b": Idefics3Config("idefics3", replace(SO400M, image_size=364, shuffle=2), LLAMA_8B, 128257),
}
