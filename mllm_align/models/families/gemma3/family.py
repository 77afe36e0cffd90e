"""Gemma 3 with images: SigLIP, pooled; one matrix; a decoder with windows and image blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm_align.errors import refusal
from mllm_align.models import names
from mllm_align.models.families import siglip, vit
from mllm_align.models.families.base import IMAGE_SETTINGS, ModelFamily
from mllm_align.models.families.gemma3.config import Gemma3Config, parse_config
from mllm_align.models.families.gemma3.layout import Gemma3Layout
from mllm_align.models.families.gemma3.presets import PRESETS
from mllm_align.models.families.gemma3.vision import Projector
from mllm_align.models.families.llava.family import canonical_name
from mllm_align.models.names import Entry
from mllm_align.models.ranges import OneOf


class Gemma3(ModelFamily[Gemma3Config]):
    modules = {
        "vision_tower": "vision_tower",
        "projector": "multi_modal_projector",
        "decoder": "language_model",
    }
    image_settings = IMAGE_SETTINGS | {
        "do_resize": OneOf((True,)),
        "do_pan_and_scan": OneOf((None, False)),
    }
    presets = PRESETS

    def config(self, path: Path, raw: dict[str, Any]) -> Gemma3Config:
        return parse_config(path, raw)

    def canonical(self, name: str) -> str:
        return canonical_name(name)

    def entries(self, config: Gemma3Config) -> Iterator[Entry]:
        yield from siglip.tensors(config.vision, self.modules["vision_tower"])
        module, width = self.modules["projector"], config.vision.features
        yield from names.norm(("projector", "norm"), f"{module}.mm_soft_emb_norm", width, False)
        matrix, shape = f"{module}.mm_input_projection_weight", (width, config.decoder.hidden)
        yield names.same(("projector", "linear", "kernel"), matrix, shape)
        yield from names.decoder(config.decoder, self.modules["decoder"])

    def tower(self, config: Gemma3Config, remat: str) -> siglip.SiglipTower:
        return siglip.SiglipTower(config.vision, remat)

    def projector(self, config: Gemma3Config) -> Projector:
        return Projector(config.decoder.hidden, config.vision.norm_eps)

    def tower_flops(self, config: Gemma3Config, tiles: int) -> float:
        return tiles * vit.block_flops(config.vision)

    def projector_flops(self, config: Gemma3Config, tiles: int) -> float:
        v = config.vision
        return 2 * tiles * v.tokens * v.features * config.decoder.hidden

    def layout(self, config: Gemma3Config, processor: Any = None) -> Gemma3Layout:
        v = config.vision
        sizes = v.image_size, v.patch_size, v.tokens
        if processor is None:
            return Gemma3Layout(*sizes)
        tokenizer = processor.tokenizer
        layout = Gemma3Layout(
            *sizes,
            token=processor.image_token or Gemma3Layout.token,
            begin=getattr(tokenizer, "boi_token", None) or Gemma3Layout.begin,
            end=getattr(tokenizer, "eoi_token", None) or Gemma3Layout.end,
        )
        for token in (layout.begin, layout.end):
            if token not in tokenizer.get_vocab():
                problem = f"it has no token {token}, which stands around images"
                raise refusal(f"{tokenizer.name_or_path}: tokenizer", problem, "take the model's own")
        return layout
