"""LLaVA 1.5 and 1.6: CLIP, a projector of two linear maps, a Llama-family decoder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mllm_align.errors import quoted, refusal
from mllm_align.models import names
from mllm_align.models.families import vit
from mllm_align.models.families.base import ModelFamily
from mllm_align.models.families.llava.config import LlavaConfig, LlavaLikeConfig, parse_config
from mllm_align.models.families.llava.layout import LlavaLayout
from mllm_align.models.families.llava.presets import LLAVA_15, LLAVA_16
from mllm_align.models.families.llava.vision import ClipTower, Projector
from mllm_align.models.names import Entry

CONVERT = (
    "is in the original LLaVA (liuhaotian) layout; convert it with transformers'"
    " convert_llava_next_weights_to_hf.py (convert_llava_weights_to_hf.py for 1.5,"
    " convert_llava_onevision_weights_to_hf.py for OneVision), or take the same model from a llava-hf"
    " folder"
)
L = TypeVar("L", bound=LlavaLikeConfig)


def canonical_name(name: str) -> str:
    """Of a tensor of LLaVA's kind of models."""
    # llava-hf:  language_model.model.layers.0...   language_model.lm_head  vision_tower.vision_model...
    # 4.52:      model.language_model.layers.0...   lm_head                 model.vision_tower...
    # 5.x:       either, with or without `vision_model`
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


class LlavaLike(ModelFamily[L]):
    """What all LLaVAs have, whatever their tower is: names, a projector of two linear maps, AnyRes."""

    modules = {
        "vision_tower": "vision_tower",
        "projector": "multi_modal_projector",
        "image_newline": "image_newline",
        "decoder": "language_model",
    }

    def canonical(self, name: str) -> str:
        return canonical_name(name)

    def entries(self, config: L) -> Iterator[Entry]:
        yield from self.of_tower(config, self.modules["vision_tower"])
        hidden, module = config.decoder.hidden, self.modules["projector"]
        for name, width in (("linear_1", config.vision.features), ("linear_2", hidden)):
            shape = (hidden, width)
            yield from names.linear(("projector", name), f"{module}.{name}", shape, config.projector_bias)
        if config.newline:
            yield names.same(("image_newline",), "image_newline", (hidden,))
        yield from names.decoder(config.decoder, self.modules["decoder"])

    def of_tower(self, config: L, module: str) -> Iterator[Entry]:
        """Its tensors; module: its name in the checkpoint."""
        raise NotImplementedError

    def projector(self, config: L) -> Projector:
        return Projector(config.decoder.hidden, config.projector_activation, config.projector_bias)

    def projector_flops(self, config: L, tiles: int) -> float:
        v, d = config.vision, config.decoder
        return 2 * tiles * v.tokens * d.hidden * (v.features + d.hidden)

    def check_processor(self, at: str, images: Any, config: L) -> None:
        pinpoints = getattr(images, "image_grid_pinpoints", None)
        canvases = tuple((height, width) for height, width in pinpoints or ())
        if canvases != config.pinpoints:
            problem = (
                f"image_grid_pinpoints are {quoted(canvases)}, in config.json {quoted(config.pinpoints)}"
            )
            raise refusal(at, problem, "take both files from one folder")


class Llava(LlavaLike[LlavaConfig]):
    presets = LLAVA_15

    def config(self, path: Path, raw: dict[str, Any]) -> LlavaConfig:
        return parse_config(path, raw)

    def foreign(self, raw: Mapping[str, Any], tensors: Mapping[str, str] = {}) -> str | None:
        original = "mm_vision_tower" in raw or "mm_projector_type" in raw
        return CONVERT if original or any("mm_projector" in name for name in tensors) else None

    def of_tower(self, config: LlavaConfig, module: str) -> Iterator[Entry]:
        v = config.vision
        yield from vit.tensors(v, module, bias=False)
        embedding = f"{module}.embeddings.class_embedding"
        yield names.same(("vision_tower", "class_embedding"), embedding, (v.hidden,))
        yield from names.norm(("vision_tower", "pre_norm"), f"{module}.pre_layrnorm", v.hidden, True)

    def tower(self, config: LlavaConfig, remat: str) -> ClipTower:
        return ClipTower(config.vision, remat)

    def tower_flops(self, config: LlavaConfig, tiles: int) -> float:
        return tiles * vit.block_flops(config.vision)

    def layout(self, config: LlavaConfig, processor: Any = None) -> LlavaLayout:
        v = config.vision
        token = getattr(processor, "image_token", None) or LlavaLayout.token
        return LlavaLayout(v.image_size, v.patch_size, v.keep_class_token, config.pinpoints, token)


class LlavaNext(Llava):
    presets = LLAVA_16
