"""Qwen3-VL, the dense models: a tower for images of any size, a decoder that it reaches at several layers.

No video, no mixture of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_align.models import names
from mllm_align.models.families.qwen3_vl.config import Qwen3VLConfig, parse_config
from mllm_align.models.families.qwen3_vl.presets import PRESETS
from mllm_align.models.families.qwen3_vl.vision import Projector, Qwen3Tower
from mllm_align.models.families.qwen_vl.family import QwenVL
from mllm_align.models.names import Entry


class Qwen3VL(QwenVL[Qwen3VLConfig]):
    presets = PRESETS
    fewest = 64

    def config(self, path: Path, raw: dict[str, Any]) -> Qwen3VLConfig:
        return parse_config(path, raw)

    def entries(self, config: Qwen3VLConfig) -> Iterator[Entry]:
        v, tower, root = config.vision, self.modules["vision_tower"], ("vision_tower",)
        yield from self.of_patches(config, bias=True)
        table = (*root, "positions", "embedding")
        yield names.same(table, f"{tower}.pos_embed.weight", (v.side**2, v.hidden))
        first = 0
        for stack, layers in enumerate(v.stacks):
            for i in range(layers):
                yield from self._block(config, (*root, f"layers_{stack}"), f"{tower}.blocks.{first + i}", i)
            first += layers
        for i in range(len(v.deepstack)):
            here = f"{tower}.deepstack_merger_list.{i}"
            yield from self._merger(config, (*root, f"merger_{i}"), here, v.cell)
        yield from self._merger(config, ("projector", "merger"), self.modules["projector"], v.hidden)
        yield from names.decoder(config.decoder, self.modules["decoder"])

    def _block(self, config: Qwen3VLConfig, path: names.Path, here: str, layer: int) -> Iterator[Entry]:
        v = config.vision
        yield from self.of_attention(config, path, here, layer)
        wide, narrow = (v.mlp, v.hidden), (v.hidden, v.mlp)
        yield from names.linear((*path, "fc_1"), f"{here}.mlp.linear_fc1", wide, True, layer)
        yield from names.linear((*path, "fc_2"), f"{here}.mlp.linear_fc2", narrow, True, layer)
        yield from names.norm((*path, "norm_1"), f"{here}.norm1", v.hidden, True, layer)
        yield from names.norm((*path, "norm_2"), f"{here}.norm2", v.hidden, True, layer)

    def _merger(self, config: Qwen3VLConfig, path: names.Path, here: str, norm: int) -> Iterator[Entry]:
        v = config.vision
        yield from names.norm((*path, "norm"), f"{here}.norm", norm, True)
        yield from names.linear((*path, "linear_1"), f"{here}.linear_fc1", (v.cell, v.cell), True)
        yield from names.linear((*path, "linear_2"), f"{here}.linear_fc2", (v.out, v.cell), True)

    def tower(self, config: Qwen3VLConfig, remat: str) -> Qwen3Tower:
        return Qwen3Tower(config.vision, remat)

    def projector(self, config: Qwen3VLConfig) -> Projector:
        return Projector(config.vision)

    def tower_flops(self, config: Qwen3VLConfig, tiles: int) -> float:
        """As if all cells were of one image."""
        v, patches = config.vision, tiles * config.vision.patches
        block = 2 * patches * (4 * v.hidden**2 + 2 * v.hidden * v.mlp) + 4 * patches**2 * v.hidden
        return v.layers * block + len(v.deepstack) * self.projector_flops(config, tiles)
