"""Qwen3-VL, the dense models: a tower for images of any size, a decoder that it reaches at several layers.

No video, no mixture of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_align.errors import refusal
from mllm_align.models import names
from mllm_align.models.families.base import IMAGE_SETTINGS, ModelFamily
from mllm_align.models.families.qwen3_vl.config import Qwen3VLConfig, parse_config
from mllm_align.models.families.qwen3_vl.layout import QwenLayout
from mllm_align.models.families.qwen3_vl.presets import PRESETS
from mllm_align.models.families.qwen3_vl.vision import Projector, QwenTower
from mllm_align.models.names import Entry
from mllm_align.models.ranges import OneOf, Whole

AREA = Whole(1, 1 << 31)
PLANNED = 1280
"""Embeddings of the image that is planned for: published folders allow 16,384, a picture of 4096 x 4096."""


class Qwen3VL(ModelFamily[Qwen3VLConfig]):
    modules = {"vision_tower": "visual", "projector": "visual.merger", "decoder": "language_model"}
    image_settings = IMAGE_SETTINGS | {
        "do_resize": OneOf((True,)),
        "size.shortest_edge": AREA,
        "size.longest_edge": AREA,
    }
    presets = PRESETS

    def config(self, path: Path, raw: dict[str, Any]) -> Qwen3VLConfig:
        return parse_config(path, raw)

    def canonical(self, name: str) -> str:
        return name.removeprefix("model.")

    def entries(self, config: Qwen3VLConfig) -> Iterator[Entry]:
        v, tower, root = config.vision, self.modules["vision_tower"], ("vision_tower",)
        shape = (v.hidden, 3, v.frames, v.patch_size, v.patch_size)
        patch, path = f"{tower}.patch_embed.proj", (*root, "patch_embedding")
        yield Entry(f"{patch}.weight", (*path, "kernel"), None, shape, "transpose")
        yield names.same((*path, "bias"), f"{patch}.bias", (v.hidden,))
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
        qkv, ours = f"{here}.attn.qkv", (*path, "qkv")
        yield Entry(f"{qkv}.weight", (*ours, "kernel"), layer, (3 * v.hidden, v.hidden), "qkv")
        yield Entry(f"{qkv}.bias", (*ours, "bias"), layer, (3 * v.hidden,), "qkv")
        square, wide, narrow = (v.hidden, v.hidden), (v.mlp, v.hidden), (v.hidden, v.mlp)
        yield from names.linear((*path, "o"), f"{here}.attn.proj", square, True, layer)
        yield from names.linear((*path, "fc_1"), f"{here}.mlp.linear_fc1", wide, True, layer)
        yield from names.linear((*path, "fc_2"), f"{here}.mlp.linear_fc2", narrow, True, layer)
        yield from names.norm((*path, "norm_1"), f"{here}.norm1", v.hidden, True, layer)
        yield from names.norm((*path, "norm_2"), f"{here}.norm2", v.hidden, True, layer)

    def _merger(self, config: Qwen3VLConfig, path: names.Path, here: str, norm: int) -> Iterator[Entry]:
        v = config.vision
        yield from names.norm((*path, "norm"), f"{here}.norm", norm, True)
        yield from names.linear((*path, "linear_1"), f"{here}.linear_fc1", (v.cell, v.cell), True)
        yield from names.linear((*path, "linear_2"), f"{here}.linear_fc2", (v.out, v.cell), True)

    def tower(self, config: Qwen3VLConfig, remat: str) -> QwenTower:
        return QwenTower(config.vision, remat)

    def projector(self, config: Qwen3VLConfig) -> Projector:
        return Projector(config.vision)

    def tower_flops(self, config: Qwen3VLConfig, tiles: int) -> float:
        """As if all cells were of one image."""
        v, patches = config.vision, tiles * config.vision.patches
        block = 2 * patches * (4 * v.hidden**2 + 2 * v.hidden * v.mlp) + 4 * patches**2 * v.hidden
        return v.layers * block + len(v.deepstack) * self.projector_flops(config, tiles)

    def projector_flops(self, config: Qwen3VLConfig, tiles: int) -> float:
        v = config.vision
        return 2 * tiles * v.cell * (v.cell + v.out)

    def layout(self, config: Qwen3VLConfig, processor: Any = None) -> QwenLayout:
        v = config.vision
        sizes, unit = (v.patch_size, v.merge, v.frames), v.patch_size * v.merge
        if processor is None:
            return QwenLayout(*sizes, fewest=64 * unit**2, most=PLANNED * unit**2)
        area = dict(processor.image_processor.size)
        token = processor.image_token or QwenLayout.token
        return QwenLayout(*sizes, area["shortest_edge"], area["longest_edge"], token)

    def check_processor(self, at: str, images: Any, config: Qwen3VLConfig) -> None:
        v = config.vision
        for name, of_model in (
            ("patch_size", v.patch_size),
            ("merge_size", v.merge),
            ("temporal_patch_size", v.frames),
        ):
            if getattr(images, name, None) != of_model:
                problem = f"{name} is {getattr(images, name, None)!r}, in config.json {of_model}"
                raise refusal(at, problem, "take both files from one folder")
        fewest, most = (dict(images.size)[f"{name}_edge"] for name in ("shortest", "longest"))
        if fewest > most:
            problem = f"size.shortest_edge is {fewest}, above size.longest_edge, which is {most}"
            raise refusal(at, f"{problem} (pixels of an image)", "mend one of them")
