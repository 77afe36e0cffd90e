"""The stored goldens, as this package takes them (oracle/make_goldens.py wrote them with torch)."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from oracle.noise import perturb
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import LlavaNextProcessor, LlavaProcessor

from mllm_align.batch import Group, HostPrefix, Pixels, PromptGroup, Shape, pad
from mllm_align.data.layout import mixed, ordered, rotary, whole_tiles
from mllm_align.models.huggingface import Folder, load_params, open_folder
from mllm_align.models.processor import load_processor
from mllm_align.models.vlm import VisionLanguageModel

FIXTURES = Path(__file__).parent / "fixtures" / "goldens"
NAMES = ("llava15", "llavanext")
ALL = (*NAMES, "onevision", "idefics3", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")


@dataclass(frozen=True)
class Goldens:
    """One model's folder, and what torch, transformers and TRL computed with it.

    Rows of the stored batches: the chosen responses of all pairs, then the rejected ones. `at` is the
    name of a batch: "" or "trajectory/step<i>/".
    """

    folder: Folder
    arrays: dict[str, np.ndarray]
    numbers: dict
    root: Path = FIXTURES

    @property
    def config(self):
        return self.folder.config

    @cached_property
    def model(self) -> VisionLanguageModel:
        return VisionLanguageModel(self.config)

    @cached_property
    def base(self) -> dict:
        return load_params(self.folder, np.float32)

    @cached_property
    def policy(self) -> dict:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary)
            (path / "config.json").write_text((self.folder.path / "config.json").read_text())
            weights = perturb(load_file(self.folder.path / "model.safetensors"))
            save_file(weights, path / "model.safetensors")
            return load_params(open_folder(path), np.float32)

    @cached_property
    def layout(self) -> Any:
        return self.folder.family.layout(self.config, self._processor)

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """Of all pairs, in their order."""
        lines = (self.root / "pairs.jsonl").read_text().splitlines()
        return [Image.open(self.root / json.loads(line)["images"][0]) for line in lines]

    @cached_property
    def _processor(self):
        return load_processor(self.folder.path)

    def processed(self, pair: int) -> Pixels:
        """A picture as the folder's own processor makes it."""
        process = self._processor.image_processor
        cut = {"crop_to_patches": True} if hasattr(process, "crop_to_patches") else {}
        made = process(self.pictures[pair], return_tensors="np", **cut)
        pixels = made["pixel_values"]
        return self._patched(pixels if {"image_grid_thw", "num_patches"} & set(made) else pixels[0], pair)

    def stored(self, row: int, pair: int) -> Pixels:
        """A picture as it stands in a row of the stored batch."""
        pixels = self.arrays["pixel_values"]
        if "image_grid_thw" in self.arrays:  # of all rows behind each other
            ends = self.arrays["image_grid_thw"].prod(1).cumsum()
        elif self.config.family == "internvl":  # likewise
            half = len(self.arrays["row_index"]) // 2
            sizes = (self.pictures[i].size for i in self.arrays["row_index"][:half])
            ends = np.cumsum([self.layout.tiles(height, width)[0] for width, height in sizes])
        else:
            return self._patched(pixels[row], pair)
        return self._patched(np.split(pixels, ends[:-1])[row], pair)

    def _patched(self, pixels: np.ndarray, pair: int) -> Pixels:
        width, height = self.pictures[pair].size
        if pixels.ndim == 2:
            return self.layout.patched(pixels, *self.layout.cells(height, width))
        pixels = pixels.reshape(-1, *pixels.shape[-3:])[: self.layout.tiles(height, width)[0]]
        return whole_tiles(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), self.layout.patch)

    def groups(self, at: str = "") -> list[Group]:
        """The pairs of a stored batch. Tiles are the stored ones, or come from the PNGs."""
        groups, pairs = [], self.arrays[f"{at}row_index"]
        half = len(pairs) // 2
        for i, pair in enumerate(pairs[:half]):
            prefix, chosen = self._row(at, i)
            _, rejected = self._row(at, half + i)
            width, height = self.pictures[pair].size
            image = np.full(len(prefix), -1, np.int32)
            image[prefix == self.config.image_token] = self.rows_of(height, width)
            runs = self.layout.runs(height, width, 1, 0)
            shares, rope = mixed(image, runs, self.layout.taps), rotary(image, runs, self.layout.axes)
            pixels = self.processed(pair) if at else self.stored(i, pair)
            order = ordered(image, runs)
            prompt = replace(HostPrefix.causal(prefix, image, pixels, **shares), order=order, rope=rope)
            groups.append(Group((prompt,), (chosen, rejected)))
        return groups

    def rows_of(self, height: int, width: int) -> np.ndarray:
        """Of a picture's embeddings in the image table, in the prompt's order."""
        return np.concatenate([run.rows for run in self.layout.runs(height, width, 1, 0)])

    def _row(self, at: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        real = self.arrays[f"{at}attention_mask"][row].astype(bool)
        tokens = self.arrays[f"{at}input_ids"][row][real]
        response = self.arrays[f"{at}completion_mask"][row][real].astype(bool)
        return tokens[~response], tokens[response]

    def batch(self, at: str = "") -> PromptGroup:
        groups = self.groups(at)
        return pad(groups, union(groups), len(groups))

    def rows(self, array: np.ndarray, alone: bool = False) -> list[np.ndarray]:
        """The response's numbers of each row of a stored [rows, S - 1] array."""
        out = []
        for row, values in enumerate(array):
            prefix, response = self._row("", row)
            if alone:
                out.append(values[len(prefix) - 1 :][: len(response)])
            else:
                mask = self.arrays["completion_mask"] * self.arrays["attention_mask"]
                out.append(values[mask[row, 1:] == 1])
        return out


@cache
def goldens(name: str, root: Path = FIXTURES) -> Goldens:
    with np.load(root / f"{name}.npz") as arrays:
        numbers = json.loads((root / f"{name}.json").read_text())
        return Goldens(open_folder(root / name), dict(arrays), numbers, root)


def of_transformers(name: str) -> Any:
    """The processor of transformers for a stored model."""
    kind = LlavaProcessor if name == "llava15" else LlavaNextProcessor
    return kind.from_pretrained(FIXTURES / name)


def union(groups: list[Group]) -> Shape:
    """The smallest shape that holds all of them."""
    shape = groups[0].shape
    for group in groups:
        shape = shape.union(group.shape)
    return shape


def responses(values: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """[B, K, R] as one array for each response, in the goldens' order: response 0 of all groups first."""
    count = mask.shape[1]
    return [v[m] for k in range(count) for v, m in zip(values[:, k], mask[:, k], strict=True)]


def packed_images(model: VisionLanguageModel, params: dict, group: PromptGroup) -> list[np.ndarray]:
    """The image embeddings of each group's prompt, in the prompt's order."""

    @jax.jit
    def made(params, prefix):
        features = model.apply({"params": params}, prefix.pixels, method="features")
        return model.apply({"params": params}, features, prefix, method="embed")[0]

    rows = np.asarray(made(params, group.prefix))
    return [row[image >= 0] for row, image in zip(rows, np.asarray(group.prefix.image), strict=True)]
