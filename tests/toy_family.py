"""A family that the package does not know: own config.json, names, tower, projector and image layout.

An image becomes one to three strips, wide tiles under each other, by its shape. Each strip stands in the
prompt as a run of its own, with text between them. `docs/families.md` is about this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from mllm_align.batch import Pixels
from mllm_align.data.layout import Run
from mllm_align.models import names
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.base import ModelFamily
from mllm_align.models.families.llama import decoder_config
from mllm_align.models.layers import Linear, RMSNorm
from mllm_align.models.names import Entry
from mllm_align.models.ranges import WIDTH, Object, Whole, fields
from mllm_align.testbed.demo import make_model

# ---- the configuration ---------------------------------------------------------------------------------

FIELDS = {
    "image_token_id": (None, Whole(0, 1 << 20)),
    "text_config": (None, Object()),
    "strip": (None, Object()),
}
STRIP = {
    "patch": (8, Whole(1, 64)),
    "down": (2, Whole(1, 64)),
    "across": (4, Whole(1, 64)),
    "width": (16, WIDTH),
}


@dataclass(frozen=True)
class StripConfig:
    """Strips of down x across patches; the two halves of a strip's columns are averaged."""

    patch: int
    down: int
    across: int
    width: int
    heads: int = 1

    @property
    def patches(self) -> int:
        return self.down * self.across

    @property
    def patch_width(self) -> int:
        return 3 * self.patch**2

    @property
    def tokens(self) -> int:
        return self.patches // 2

    @property
    def features(self) -> int:
        return self.width


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    vision: StripConfig


# ---- the modules ---------------------------------------------------------------------------------------


class Tower(nn.Module):
    config: StripConfig

    @nn.compact
    def __call__(self, patches, place):
        c = self.config
        x = Linear(c.width, ("patch", "embed"), bias=True, name="patch")(patches)
        x = x * (place[..., :1] + 1).astype(x.dtype)  # lower rows are louder
        return x.reshape(len(x), c.down, c.across // 2, 2, -1).mean(3).reshape(len(x), c.tokens, -1)


class Projector(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        return Linear(self.hidden, ("mlp", "embed"), name="linear")(RMSNorm(1e-6, name="norm")(x))


# ---- the images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strips:
    """The template writes <pad> for an image; the model's image token is <image>."""

    config: StripConfig
    mark: str = "<pad>"
    token: str = "<image>"
    taps = 0
    axes = 1
    overview = slice(None)

    @property
    def tokens(self) -> int:
        return self.config.tokens

    @property
    def largest(self) -> tuple[tuple[int, int], ...]:
        return ((300, 100),)

    def grid(self, height: int, width: int, images: int = 1) -> tuple[int, int] | None:
        return min(max(2 * height // width, 1), 3), 1

    def tiles(self, height: int, width: int, images: int) -> tuple[int, int]:
        """Of several images each becomes one strip."""
        return 1 if images > 1 else min(max(2 * height // width, 1), 3), self.config.patches

    def text(self, height: int, width: int, images: int) -> str:
        count, _ = self.tiles(height, width, images)
        return "".join(f"\nrow {number}: {self.token}" for number in range(count)) + ".\n"

    def runs(self, height: int, width: int, images: int, tile: int) -> list[Run]:
        count, _ = self.tiles(height, width, images)
        rows = 1 + np.arange(tile * self.tokens, (tile + count) * self.tokens, dtype=np.int32)
        return [Run(strip) for strip in rows.reshape(count, -1)]

    def empty(self) -> Pixels:
        c = self.config
        return Pixels(
            np.zeros((0, c.patches, c.patch_width), np.float32), np.zeros((0, c.patches, 2), np.int16)
        )

    def pixels(self, process: Any, image: Image.Image, images: int) -> Pixels:
        c, (count, _) = self.config, self.tiles(image.height, image.width, images)
        sized = image.resize((c.across * c.patch, count * c.down * c.patch))
        made = np.asarray(process([sized], return_tensors="np")["pixel_values"][0], np.float32)
        strips = made.reshape(3, count, c.down, c.patch, c.across, c.patch).transpose(1, 2, 4, 0, 3, 5)
        place = np.indices((c.down, c.across), np.int16).reshape(2, -1).T
        place = np.ascontiguousarray(np.broadcast_to(place, (count, *place.shape)))
        return Pixels(np.ascontiguousarray(strips.reshape(count, c.patches, -1)), place)

    def noise(self, draw: Callable[[tuple[int, ...]], Any], shape: tuple[int, ...]) -> Any:
        return draw(shape)


# ---- the family ----------------------------------------------------------------------------------------


class Toy(ModelFamily[ToyConfig]):
    modules = {"vision_tower": "eye", "projector": "bridge", "decoder": "text"}

    def config(self, path: Path, raw: dict[str, Any]) -> ToyConfig:
        at, remedy = f"{path}/config.json", "make it again"
        whole = fields(at, raw, FIELDS, remedy)
        strip = fields(at, whole["strip"], STRIP, remedy, "strip.")
        decoder = decoder_config(at, whole["text_config"], remedy)
        return ToyConfig("toy", StripConfig(**strip), decoder, whole["image_token_id"])

    def canonical(self, name: str) -> str:
        return name.removeprefix("model.")

    def entries(self, config: ToyConfig) -> Iterator[Entry]:
        v, hidden = config.vision, config.decoder.hidden
        shape = (v.width, v.patch_width)
        yield from names.linear(("vision_tower", "patch"), "eye.patch", shape, True)
        yield from names.norm(("projector", "norm"), "bridge.norm", v.width, False)
        yield from names.linear(("projector", "linear"), "bridge.linear", (hidden, v.width), False)
        yield from names.decoder(config.decoder, "text")

    def tower(self, config: ToyConfig, remat: str) -> Tower:
        return Tower(config.vision)

    def projector(self, config: ToyConfig) -> Projector:
        return Projector(config.decoder.hidden)

    def tower_flops(self, config: ToyConfig, tiles: int) -> float:
        return 2 * tiles * config.vision.patches * config.vision.patch_width * config.vision.width

    def projector_flops(self, config: ToyConfig, tiles: int) -> float:
        return 2 * tiles * config.vision.tokens * config.vision.width * config.decoder.hidden

    def layout(self, config: ToyConfig, processor: Any = None) -> Strips:
        return Strips(config.vision)


def make_toy(out: Path, seed: int = 0) -> Path:
    """A folder of the family, its tokenizer and image processor a demo LLaVA's."""
    make_model(out, "llava", hidden=32, mlp=48, heads=2, kv_heads=1, head_dim=16)
    text = json.loads((out / "config.json").read_text())["text_config"]
    raw = {"model_type": "toy", "image_token_id": 4, "text_config": text, "strip": {}}
    (out / "config.json").write_text(json.dumps(raw))
    settings = json.loads((out / "processor_config.json").read_text())
    settings["image_processor"] |= {"do_resize": False, "do_center_crop": False}
    (out / "processor_config.json").write_text(json.dumps(settings))
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").write_text(template.replace("<image>", "<pad>"))
    rng, family = np.random.default_rng(seed), Toy()
    tensors = {}
    for entry in family.entries(family.config(out, raw)):
        values = rng.standard_normal(entry.shape, np.float32) / np.sqrt(entry.shape[-1])
        tensors[entry.name if entry.name == names.HEAD else f"model.{entry.name}"] = values.astype(
            np.float32
        )
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
