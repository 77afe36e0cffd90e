"""InternVL3 and 3.5 in transformers' format: InternViT, a pixel shuffle, a Qwen decoder. No video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_align.errors import refusal
from mllm_align.models import names
from mllm_align.models.families import vit
from mllm_align.models.families.base import IMAGE_SETTINGS, ModelFamily
from mllm_align.models.families.internvl.config import InternVLConfig, parse_config
from mllm_align.models.families.internvl.layout import InternVLLayout
from mllm_align.models.families.internvl.presets import PRESETS
from mllm_align.models.families.internvl.vision import InternVit, Projector
from mllm_align.models.families.llava.family import canonical_name
from mllm_align.models.names import Entry
from mllm_align.models.ranges import FLAG, Maybe, OneOf, Whole

ORIGINAL = (
    "is in the original InternVL (internvl_chat) layout; take the same model's folder in transformers' own,"
    " whose name ends in -hf, such as OpenGVLab/InternVL3-8B-hf"
)
TILES = Whole(1, 64)


class InternVL(ModelFamily[InternVLConfig]):
    modules = {
        "vision_tower": "vision_tower",
        "projector": "multi_modal_projector",
        "decoder": "language_model",
    }
    image_settings = IMAGE_SETTINGS | {
        "do_resize": OneOf((True,)),
        "crop_to_patches": Maybe(FLAG),
        "min_patches": TILES,
        "max_patches": TILES,
    }
    presets = PRESETS

    def config(self, path: Path, raw: dict[str, Any]) -> InternVLConfig:
        return parse_config(path, raw)

    def foreign(self, raw: Mapping[str, Any], tensors: Mapping[str, str] = {}) -> str | None:
        original = raw.get("model_type") == "internvl_chat" or any(t.startswith("mlp1.") for t in tensors)
        return ORIGINAL if original else None

    def canonical(self, name: str) -> str:
        return canonical_name(name)

    def entries(self, config: InternVLConfig) -> Iterator[Entry]:
        yield from self._tower(config, self.modules["vision_tower"])
        module, hidden, width = self.modules["projector"], config.decoder.hidden, config.vision.features
        yield from names.norm(("projector", "norm"), f"{module}.layer_norm", width, True)
        for name, shape in (("linear_1", (hidden, width)), ("linear_2", (hidden, hidden))):
            yield from names.linear(("projector", name), f"{module}.{name}", shape, True)
        yield from names.decoder(config.decoder, self.modules["decoder"])

    def _tower(self, config: InternVLConfig, module: str) -> Iterator[Entry]:
        c, tower, embeddings = config.vision, ("vision_tower",), f"{module}.embeddings"
        patch, path = f"{embeddings}.patch_embeddings.projection", (*tower, "patch_embedding")
        shape = (c.hidden, 3, c.patch_size, c.patch_size)
        yield Entry(f"{patch}.weight", (*path, "kernel"), None, shape, "patch")
        yield names.same((*path, "bias"), f"{patch}.bias", (c.hidden,))
        for ours, theirs, count in (
            ("class", "cls_token", 1),
            ("position", "position_embeddings", c.places),
        ):
            yield names.same((*tower, f"{ours}_embedding"), f"{embeddings}.{theirs}", (1, count, c.hidden))
        for i in range(c.layers):
            yield from self._block(config, (*tower, "layers"), f"{module}.encoder.layer.{i}", i)

    def _block(self, config: InternVLConfig, path: names.Path, here: str, i: int) -> Iterator[Entry]:
        c, attention = config.vision, f"{here}.attention"
        square = (c.hidden, c.hidden)
        for name in "qkv":
            yield from names.linear((*path, name), f"{attention}.{name}_proj", square, c.qkv_bias, i)
        yield from names.linear((*path, "o"), f"{attention}.projection_layer", square, True, i)
        for name in "qk" if c.qk_norm else "":
            yield from names.norm((*path, f"norm_{name}"), f"{attention}.{name}_norm", c.hidden, False, i)
        yield from names.linear((*path, "fc_1"), f"{here}.mlp.fc1", (c.mlp, c.hidden), True, i)
        yield from names.linear((*path, "fc_2"), f"{here}.mlp.fc2", (c.hidden, c.mlp), True, i)
        for number, when in ((1, "before"), (2, "after")):
            norm = f"{here}.layernorm_{when}"
            yield from names.norm((*path, f"norm_{number}"), norm, c.hidden, not c.rms_norm, i)
            scale = (*path, f"scale_{number}")
            yield Entry(f"{here}.lambda_{number}", scale, i, (c.hidden,), "same")

    def tower(self, config: InternVLConfig, remat: str) -> InternVit:
        return InternVit(config.vision, remat)

    def projector(self, config: InternVLConfig) -> Projector:
        return Projector(config.decoder.hidden, config.projector_activation)

    def tower_flops(self, config: InternVLConfig, tiles: int) -> float:
        return tiles * vit.block_flops(config.vision)

    def projector_flops(self, config: InternVLConfig, tiles: int) -> float:
        v, d = config.vision, config.decoder
        return 2 * tiles * v.tokens * d.hidden * (v.features + d.hidden)

    def layout(self, config: InternVLConfig, processor: Any = None) -> InternVLLayout:
        v = config.vision
        sizes = v.image_size, v.patch_size, v.tokens
        if processor is None:
            return InternVLLayout(*sizes)
        images, tokenizer = processor.image_processor, processor.tokenizer
        layout = InternVLLayout(
            *sizes,
            fewest=images.min_patches,
            most=images.max_patches,
            token=getattr(tokenizer, "context_image_token", None) or InternVLLayout.token,
            begin=getattr(tokenizer, "start_image_token", None) or InternVLLayout.begin,
            end=getattr(tokenizer, "end_image_token", None) or InternVLLayout.end,
        )
        for token in (layout.begin, layout.end):
            if token not in tokenizer.get_vocab():
                problem = f"it has no token {token}, which stands around images"
                raise refusal(f"{tokenizer.name_or_path}: tokenizer", problem, "take the model's own")
        return layout

    def check_processor(self, at: str, images: Any, config: InternVLConfig) -> None:
        if images.min_patches > images.max_patches:
            problem = (
                f"min_patches is {images.min_patches}, above max_patches, which is {images.max_patches}"
            )
            raise refusal(at, problem, "mend one of them")
