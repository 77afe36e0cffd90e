"""Idefics3 and SmolVLM (1 and 2): SigLIP, a pixel shuffle and one linear map, a Llama decoder. No video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_align.errors import refusal
from mllm_align.models import names
from mllm_align.models.families import siglip, vit
from mllm_align.models.families.base import IMAGE_SETTINGS, ModelFamily
from mllm_align.models.families.idefics3.config import Idefics3Config, parse_config
from mllm_align.models.families.idefics3.layout import Idefics3Layout
from mllm_align.models.families.idefics3.presets import PRESETS
from mllm_align.models.families.idefics3.vision import Projector
from mllm_align.models.families.siglip import SiglipTower
from mllm_align.models.names import Entry
from mllm_align.models.ranges import FLAG, PIXELS, OneOf


class Idefics3(ModelFamily[Idefics3Config]):
    modules = {"vision_tower": "vision_model", "projector": "connector", "decoder": "text_model"}
    image_settings = IMAGE_SETTINGS | {
        "do_resize": OneOf((True,)),
        "do_image_splitting": FLAG,
        "size.longest_edge": PIXELS,
        "max_image_size.longest_edge": PIXELS,
    }
    presets = PRESETS

    def config(self, path: Path, raw: dict[str, Any]) -> Idefics3Config:
        return parse_config(path, raw)

    def canonical(self, name: str) -> str:
        return name.removeprefix("model.")

    def entries(self, config: Idefics3Config) -> Iterator[Entry]:
        yield from siglip.tensors(config.vision, self.modules["vision_tower"])
        linear, shape = f"{self.modules['projector']}.modality_projection.proj", self._shape(config)
        yield from names.linear(("projector", "linear"), linear, shape, False)
        yield from names.decoder(config.decoder, self.modules["decoder"])

    def _shape(self, config: Idefics3Config) -> tuple[int, int]:
        return config.decoder.hidden, config.vision.features

    def tower(self, config: Idefics3Config, remat: str) -> SiglipTower:
        return SiglipTower(config.vision, remat)

    def projector(self, config: Idefics3Config) -> Projector:
        return Projector(config.decoder.hidden)

    def tower_flops(self, config: Idefics3Config, tiles: int) -> float:
        return tiles * vit.block_flops(config.vision)

    def projector_flops(self, config: Idefics3Config, tiles: int) -> float:
        out, width = self._shape(config)
        return 2 * tiles * config.vision.tokens * out * width

    def layout(self, config: Idefics3Config, processor: Any = None) -> Idefics3Layout:
        v = config.vision
        sizes = v.image_size, v.patch_size, v.tokens
        if processor is None:
            return Idefics3Layout(*sizes, longest=4 * v.image_size)
        images, tokenizer = processor.image_processor, processor.tokenizer
        layout = Idefics3Layout(
            *sizes,
            longest=dict(images.size)["longest_edge"],
            split=images.do_image_splitting,
            token=processor.image_token or Idefics3Layout.token,
            fence=getattr(tokenizer, "fake_image_token", None) or Idefics3Layout.fence,
            whole=getattr(tokenizer, "global_image_token", None) or Idefics3Layout.whole,
        )
        if layout.fence not in tokenizer.get_vocab():
            problem = f"it has no token {layout.fence}, which stands around images"
            raise refusal(f"{tokenizer.name_or_path}: tokenizer", problem, "take the model's own")
        return layout

    def check_processor(self, at: str, images: Any, config: Idefics3Config) -> None:
        tile = dict(images.max_image_size)["longest_edge"]
        if tile != config.vision.image_size:
            problem = f"tiles have {tile} pixels a side (max_image_size), in config.json "
            problem += f"{config.vision.image_size} (vision_config.image_size)"
            raise refusal(at, problem, "take both files from one folder")
