"""What the families of Qwen's models have in common: names of tensors, the layout, the image processor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from mllm_align.errors import refusal
from mllm_align.models import names
from mllm_align.models.families.base import IMAGE_SETTINGS, ModelFamily
from mllm_align.models.families.qwen_vl.config import QwenVLConfig
from mllm_align.models.families.qwen_vl.layout import QwenLayout
from mllm_align.models.names import Entry
from mllm_align.models.ranges import OneOf, Whole

AREA = Whole(1, 1 << 31)
PLANNED = 1280
"""Embeddings of the image that is planned for: published folders allow 16,384, of 128 x 128 cells."""

Q = TypeVar("Q", bound=QwenVLConfig)


class QwenVL(ModelFamily[Q]):
    modules = {"vision_tower": "visual", "projector": "visual.merger", "decoder": "language_model"}
    image_settings = IMAGE_SETTINGS | {
        "do_resize": OneOf((True,)),
        "size.shortest_edge": AREA,
        "size.longest_edge": AREA,
    }
    fewest: int
    """Cells of the smallest image, as published."""

    def canonical(self, name: str) -> str:
        return name.removeprefix("model.")

    def of_patches(self, config: Q, bias: bool) -> Iterator[Entry]:
        """The tensors of the patch embedding."""
        v, path = config.vision, ("vision_tower", "patch_embedding")
        shape = (v.hidden, 3, v.frames, v.patch_size, v.patch_size)
        name = f"{self.modules['vision_tower']}.patch_embed.proj"
        yield Entry(f"{name}.weight", (*path, "kernel"), None, shape, "transpose")
        if bias:
            yield names.same((*path, "bias"), f"{name}.bias", (v.hidden,))

    def of_attention(self, config: Q, path: names.Path, here: str, layer: int) -> Iterator[Entry]:
        """The tensors of a block's attention; here: the block's name in the checkpoint."""
        v = config.vision
        qkv, ours = f"{here}.attn.qkv", (*path, "qkv")
        yield Entry(f"{qkv}.weight", (*ours, "kernel"), layer, (3 * v.hidden, v.hidden), "qkv")
        yield Entry(f"{qkv}.bias", (*ours, "bias"), layer, (3 * v.hidden,), "qkv")
        square = (v.hidden, v.hidden)
        yield from names.linear((*path, "o"), f"{here}.attn.proj", square, True, layer)

    def projector_flops(self, config: Q, tiles: int) -> float:
        v = config.vision
        return 2 * tiles * v.cell * (v.cell + v.out)

    def layout(self, config: Q, processor: Any = None) -> QwenLayout:
        v = config.vision
        sizes, unit = (v.patch_size, v.merge, v.frames), v.patch_size * v.merge
        fewest, most, token = self.fewest * unit**2, PLANNED * unit**2, QwenLayout.token
        if processor is not None:
            area = dict(processor.image_processor.size)
            fewest, most = area["shortest_edge"], area["longest_edge"]
            token = processor.image_token or token
        return QwenLayout(*sizes, fewest, most, token, v.window)

    def check_processor(self, at: str, images: Any, config: Q) -> None:
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
