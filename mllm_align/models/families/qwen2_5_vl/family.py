"""Qwen2.5-VL: a tower for images of any size with attention in windows, a Qwen2 decoder. No video."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_align.models import names
from mllm_align.models.families.qwen2_5_vl.config import Qwen25VLConfig, parse_config
from mllm_align.models.families.qwen2_5_vl.presets import PRESETS
from mllm_align.models.families.qwen2_5_vl.vision import Qwen25Tower
from mllm_align.models.families.qwen_vl.family import QwenVL
from mllm_align.models.families.qwen_vl.vision import Merger
from mllm_align.models.layers import RMSNorm
from mllm_align.models.names import Entry


class Qwen25VL(QwenVL[Qwen25VLConfig]):
    presets = PRESETS
    fewest = 4

    def config(self, path: Path, raw: dict[str, Any]) -> Qwen25VLConfig:
        return parse_config(path, raw)

    def canonical(self, name: str) -> str:
        # as published:   model.layers.0...                 visual.blocks.0...         lm_head
        # 4.52 and later: model.language_model.layers.0...  model.visual.blocks.0...   lm_head
        name = re.sub(r"^model\.(?!language_model\.|visual\.)", "language_model.", name)
        return super().canonical(name)

    def entries(self, config: Qwen25VLConfig) -> Iterator[Entry]:
        v, tower, merger = config.vision, self.modules["vision_tower"], self.modules["projector"]
        yield from self.of_patches(config, bias=False)
        first = 0
        for stack, (_, layers) in enumerate(v.stacks):
            path = ("vision_tower", f"layers_{stack}")
            for i in range(layers):
                yield from self._block(config, path, f"{tower}.blocks.{first + i}", i)
            first += layers
        path = ("projector",)
        yield from names.norm((*path, "norm"), f"{merger}.ln_q", v.hidden, False)
        yield from names.linear((*path, "linear_1"), f"{merger}.mlp.0", (v.cell, v.cell), True)
        yield from names.linear((*path, "linear_2"), f"{merger}.mlp.2", (v.out, v.cell), True)
        yield from names.decoder(config.decoder, self.modules["decoder"])

    def _block(self, config: Qwen25VLConfig, path: names.Path, here: str, layer: int) -> Iterator[Entry]:
        v = config.vision
        yield from self.of_attention(config, path, here, layer)
        for name in ("gate", "up", "down"):
            shape = (v.hidden, v.mlp) if name == "down" else (v.mlp, v.hidden)
            yield from names.linear((*path, name), f"{here}.mlp.{name}_proj", shape, True, layer)
        yield from names.norm((*path, "norm_1"), f"{here}.norm1", v.hidden, False, layer)
        yield from names.norm((*path, "norm_2"), f"{here}.norm2", v.hidden, False, layer)

    def tower(self, config: Qwen25VLConfig, remat: str) -> Qwen25Tower:
        return Qwen25Tower(config.vision, remat)

    def projector(self, config: Qwen25VLConfig) -> Merger:
        return Merger(config.vision.out, config.vision.hidden, RMSNorm)

    def tower_flops(self, config: Qwen25VLConfig, tiles: int) -> float:
        """As if all cells were of one image and all windows whole."""
        v, patches = config.vision, tiles * config.vision.patches
        linear = 2 * patches * (4 * v.hidden**2 + 3 * v.hidden * v.mlp)
        seen = sum(layers * (patches if full else v.longest) for full, layers in v.stacks)
        return v.layers * linear + 4 * patches * seen * v.hidden
