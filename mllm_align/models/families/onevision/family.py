"""LLaVA-OneVision: SigLIP, AnyRes tiles pooled where they are many, a Qwen2 decoder. No video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_align.models.families import siglip, vit
from mllm_align.models.families.llava.family import LlavaLike
from mllm_align.models.families.onevision.config import OneVisionConfig, parse_config
from mllm_align.models.families.onevision.layout import OneVisionLayout
from mllm_align.models.families.onevision.presets import PRESETS
from mllm_align.models.names import Entry


class OneVision(LlavaLike[OneVisionConfig]):
    presets = PRESETS

    def config(self, path: Path, raw: dict[str, Any]) -> OneVisionConfig:
        return parse_config(path, raw)

    def of_tower(self, config: OneVisionConfig, module: str) -> Iterator[Entry]:
        yield from siglip.tensors(config.vision, module)

    def tower(self, config: OneVisionConfig, remat: str) -> siglip.SiglipTower:
        return siglip.SiglipTower(config.vision, remat)

    def tower_flops(self, config: OneVisionConfig, tiles: int) -> float:
        return tiles * vit.block_flops(config.vision)

    def layout(self, config: OneVisionConfig, processor: Any = None) -> OneVisionLayout:
        v = config.vision
        token = getattr(processor, "image_token", None) or OneVisionLayout.token
        return OneVisionLayout(v.image_size, v.patch_size, False, config.pinpoints, token, config.most)
