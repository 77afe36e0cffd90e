"""What a family of models says of itself; all else is shared. `docs/families.md` shows a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import flax.linen as nn

from mllm_align.data.layout import Layout
from mllm_align.models.config import ModelConfig
from mllm_align.models.names import Entry
from mllm_align.models.ranges import COLOURS, FLAG, PIXELS, Between, Listed, Maybe, OneOf, Range, Whole

IMAGE_SETTINGS: dict[str, Range] = {
    **dict.fromkeys(
        ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"),
        Maybe(FLAG),
    ),
    "resample": Maybe(Whole(0, 5)),
    "rescale_factor": Maybe(Between(0, 2)),
    "image_mean": Maybe(Listed(COLOURS, Between(-256, 256))),
    "image_std": Maybe(Listed(COLOURS, Between(0, 256))),
    "data_format": Maybe(OneOf(("channels_first",))),
    "input_data_format": OneOf((None,)),
    **{
        f"{field}.{side}": Maybe(PIXELS)
        for field in ("size", "crop_size")
        for side in ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
    },
}
"""What the settings of most image processors may be."""

C = TypeVar("C", bound=ModelConfig)


class ModelFamily(Generic[C]):
    """One value of config.json's model_type.

    C: the family's own configuration. It must be hashable: compiled programs are kept by it.
    """

    modules: Mapping[str, str]
    """Part of the parameter tree (see `ModelConfig.parts`) -> canonical name of its module."""
    image_settings: Mapping[str, Range] = IMAGE_SETTINGS
    """What each setting of the checkpoint's image processor may be."""
    presets: Mapping[str, C] = {}
    """Published models by name, for what needs a model's shape and not its weights."""

    # ---- the checkpoint ----------------------------------------------------------------------------

    def config(self, path: Path, raw: dict[str, Any]) -> C:
        """raw: the value of `path`/config.json. Raises InputError for a number out of range, and for a
        feature that is not computed."""
        raise NotImplementedError

    def foreign(self, raw: Mapping[str, Any], tensors: Mapping[str, str] = {}) -> str | None:
        """What to do about a folder in another program's layout, by its config.json or by its tensors'
        names; None: it is in none that the family knows. Asked whatever the model_type is."""
        return None

    def canonical(self, name: str) -> str:
        """One name for a tensor, whichever version of transformers wrote it: the path of its module in
        transformers' model class, without the leading `model.`."""
        raise NotImplementedError

    def entries(self, config: C) -> Iterator[Entry]:
        """Every tensor that the forward pass reads, under its canonical name.

        What a folder holds beyond these is not needed to compute; export copies it as it is.
        """
        raise NotImplementedError

    @property
    def embedding(self) -> str:
        """Canonical name of the table of token embeddings."""
        return f"{self.modules['decoder']}.embed_tokens.weight"

    @property
    def connector(self) -> dict[str, str]:
        """The modules between tower and decoder."""
        return {
            part: name for part, name in self.modules.items() if part not in ("vision_tower", "decoder")
        }

    # ---- the modules -------------------------------------------------------------------------------

    def tower(self, config: C, remat: str) -> nn.Module:
        """tower(patches [n, N, C], place [n, N, 2]) -> features [n, I, F] of n tiles.

        A regrouping of features without parameters (a pixel shuffle, pooling) belongs here.
        """
        raise NotImplementedError

    def projector(self, config: C) -> nn.Module:
        """projector(features [..., F]) -> embeddings [..., D]. Each row by itself: generation projects
        only the rows that a masked prefix still shows."""
        raise NotImplementedError

    def tower_flops(self, config: C, tiles: int) -> float:
        """Of a forward pass; a matrix product of m x k by k x n counts 2 m k n."""
        raise NotImplementedError

    def projector_flops(self, config: C, tiles: int) -> float:
        raise NotImplementedError

    # ---- the images --------------------------------------------------------------------------------

    def layout(self, config: C, processor: Any = None) -> Layout:
        """How images become patches and places in the prompt.

        processor: the checkpoint's `models.processor.Processor`; None: as the family is published.
        """
        raise NotImplementedError

    def check_processor(self, at: str, images: Any, config: C) -> None:
        """Raises InputError where an image processor (of transformers) disagrees with config.json. Its
        `image_settings`, and the shape of what it makes, are checked for all families."""
