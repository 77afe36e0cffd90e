"""Hugging Face LLaVA folders: read configuration, processor and weights.

Folders are read as they are really published (see `names.canonical` for the key layouts). Weights come
from safetensors only and no code from a folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mllm_align.errors import InputError
from mllm_align.models.config import DecoderConfig, LlavaConfig, VisionConfig
from mllm_align.models.names import EMBEDDING, HEAD, Entry, canonical, entries

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

INDEX = "model.safetensors.index.json"
ROWS = 1024  # of a matrix, read at once where all of it is not needed
CONVERT = (
    "convert it with transformers' convert_llava_next_weights_to_hf.py (or convert_llava_weights_to_hf.py"
    " for 1.5), or take the same model from a llava-hf folder"
)


@dataclass(frozen=True)
class Folder:
    """A checked Hugging Face LLaVA folder. Nothing but its configuration is read until it is asked for."""

    path: Path
    config: LlavaConfig

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name as stored -> file name."""
        return _weight_files(self.path)

    @cached_property
    def stored(self) -> dict[str, str]:
        """Canonical name -> name as stored."""
        return {canonical(name): name for name in self.files}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of configuration and weights: names what a run stands on."""
        digest = hashlib.sha256()
        for name in ["config.json", *sorted(set(self.files.values()))]:
            digest.update(name.encode())
            with open(self.path / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @cached_property
    def projector_fingerprint(self) -> str:
        """Digest of the tensors between tower and decoder: where their training starts."""
        digest, read = hashlib.sha256(), Reader(self)
        for entry in entries(self.config):
            if entry.path[0] in ("projector", "image_newline"):
                digest.update(entry.name.encode() + read(entry.name).tobytes())
        return digest.hexdigest()[:16]


def open_folder(path: str | Path) -> Folder:
    """Read the configuration of a LLaVA folder and check that its weights are there.

    Raises InputError for a folder that is missing, is no LLaVA, is in the original (liuhaotian) layout,
    uses a feature this project does not compute, or whose tensors are missing or misshapen.
    """
    folder = Folder(Path(path), read_config(path))
    apart = _untied(folder) if HEAD in folder.stored else folder
    _check_tensors(apart)
    # What is stored wins over the flag, as in transformers: a tied head may be there all the same.
    return folder if folder.config.decoder.tied and _same_head(folder) else apart


def read_config(path: str | Path) -> LlavaConfig:
    """What a folder's config.json says; weights need not be there."""
    path = Path(path)
    missing, remedy = f"{path} is no Hugging Face model folder", "give the path of a llava-hf folder"
    return _config(path, _read_json(path / "config.json", missing, f"{remedy} with all its files"))


def load_processor(path: Path) -> Any:
    """The folder's tokenizer, image processor and chat template, from transformers (Pillow backend)."""
    from transformers import LlavaNextProcessor, LlavaProcessor

    anyres = json.loads((path / "config.json").read_text())["model_type"] == "llava_next"
    try:
        return (LlavaNextProcessor if anyres else LlavaProcessor).from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"{path}: tokenizer or image processor can't be read ({_first_line(error)}); "
            "copy the processor files of the model it came from into the folder"
        ) from error


def load_params(
    folder: Folder,
    dtype: Any,
    sharding: Callable[[tuple[str, ...]], jax.sharding.Sharding] | None = None,
    only: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> dict[str, Any]:
    """The parameter tree, each leaf read slice by slice straight to the devices that keep it.

    sharding: leaf path -> where it lives (default: the first device). only: which leaves to read.
    """
    leaves: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries(folder.config):
        if only(entry.path):
            leaves.setdefault(entry.path, []).append(entry)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree: dict[str, Any] = {}
    reader = Reader(folder)
    for path, parts in leaves.items():
        where = device if sharding is None else sharding(path)
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _leaf(reader, parts, np.dtype(dtype), where)
    return tree


class Reader:
    """Reads tensors of a folder by canonical name. A file is mapped only while one of them is read: what
    is mapped counts as memory of the process."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __call__(self, name: str) -> np.ndarray:
        stored = self.folder.stored[name]
        with safe_open(self.folder.path / self.folder.files[stored], "numpy") as file:
            return file.get_tensor(stored)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """A matrix in blocks of rows, each a few MB."""
        stored = self.folder.stored[name]
        with safe_open(self.folder.path / self.folder.files[stored], "numpy") as file:
            part = file.get_slice(stored)
            count = part.get_shape()[0]
            for start in range(0, count, ROWS):
                yield part[start : min(start + ROWS, count)]


def _leaf(reader: Reader, parts: list[Entry], dtype: np.dtype, where) -> jax.Array:
    shape = parts[0].to_ours(np.empty(parts[0].shape, bool)).shape
    stacked = parts[0].layer is not None
    if stacked:
        shape = (len(parts), *shape)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        """One device's share, in memory once: tensor by tensor into a place that the device can keep."""
        out = _aligned([len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)], dtype)
        chosen, within = (parts[index[0]], index[1:]) if stacked else (parts, index)
        for place, entry in zip(out if stacked else [out], chosen, strict=True):
            place[...] = entry.to_ours(reader(entry.name))[within]
        return out

    return jax.make_array_from_callback(shape, where, read)  # type: ignore[arg-type]


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that JAX takes over on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


# ---- configuration ---------------------------------------------------------------------------------


def _config(path: Path, raw: dict[str, Any]) -> LlavaConfig:
    kind = raw.get("model_type")
    if "mm_vision_tower" in raw or "mm_projector_type" in raw:
        raise InputError(f"{path} is in the original LLaVA (liuhaotian) layout; {CONVERT}")
    if kind not in ("llava", "llava_next"):
        raise InputError(
            f"{path} is no LLaVA 1.5 or 1.6 folder: config.json has model_type {kind!r}, "
            "wanted 'llava' or 'llava_next'"
        )
    from transformers import LlavaConfig as HFLlava
    from transformers import LlavaNextConfig as HFLlavaNext

    try:
        # The classes complete partial sub-configurations by their own defaults.
        whole: Any = (HFLlavaNext if kind == "llava_next" else HFLlava).from_dict(raw)
    except Exception as error:  # the library raises many kinds; each means an unusable config.json
        raise InputError(
            f"{path}/config.json is not usable ({_first_line(error)}); "
            "copy it again from where the model came from"
        ) from error

    def refuse(what: str, value: Any, wanted: str):
        raise InputError(f"{path}/config.json: {what} is {value!r}; this program computes {wanted}")

    vision, text = whole.vision_config, whole.text_config
    if vision.model_type != "clip_vision_model":
        refuse("vision_config.model_type", vision.model_type, "'clip_vision_model'")
    if text.model_type not in ("llama", "mistral"):
        refuse("text_config.model_type", text.model_type, "'llama' and 'mistral'")
    if text.hidden_act != "silu":
        refuse("text_config.hidden_act", text.hidden_act, "'silu'")
    for where, act in (
        ("vision_config.hidden_act", vision.hidden_act),
        ("projector_hidden_act", whole.projector_hidden_act),
    ):
        if act not in ("gelu", "quick_gelu"):
            refuse(where, act, "'gelu' and 'quick_gelu'")
    rope = text.rope_parameters
    if rope.get("rope_type", "default") != "default":
        refuse("text_config rope_type", rope["rope_type"], "'default'")
    layer = whole.vision_feature_layer
    blocks = vision.num_hidden_layers
    if not isinstance(layer, int):
        refuse("vision_feature_layer", layer, "one layer")
    # hidden_states[0] is the input of the first block
    run = layer if layer >= 0 else blocks + 1 + layer
    if not 1 <= run <= blocks:
        refuse("vision_feature_layer", layer, f"the outputs of the {blocks} vision layers")
    strategy = whole.vision_feature_select_strategy
    if strategy != "default" and kind == "llava_next":
        refuse("vision_feature_select_strategy", strategy, "'default' for LLaVA 1.6")
    heads = text.num_attention_heads
    window = getattr(text, "sliding_window", None) or text.max_position_embeddings
    return LlavaConfig(
        vision=VisionConfig(
            hidden=vision.hidden_size,
            mlp=vision.intermediate_size,
            layers=run,
            heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            activation=vision.hidden_act,
            norm_eps=vision.layer_norm_eps,
            keep_class_token=strategy == "full",
        ),
        decoder=DecoderConfig(
            vocab=text.vocab_size,
            hidden=text.hidden_size,
            mlp=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=text.num_key_value_heads or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            rope_theta=float(rope["rope_theta"]),
            norm_eps=text.rms_norm_eps,
            attention_bias=bool(getattr(text, "attention_bias", False)),
            mlp_bias=bool(getattr(text, "mlp_bias", False)),
            tied=bool(whole.tie_word_embeddings),
            # within the window a sliding mask is the full one; longer records are refused
            max_length=min(window, text.max_position_embeddings),
        ),
        image_token=whole.image_token_index,
        projector_activation=whole.projector_hidden_act,
        projector_bias=whole.multimodal_projector_bias,
        pinpoints=tuple(tuple(p) for p in whole.image_grid_pinpoints) if kind == "llava_next" else (),
    )


# ---- weights ---------------------------------------------------------------------------------------


def _weight_files(path: Path) -> dict[str, str]:
    index = path / INDEX
    if index.exists():
        broken, remedy = f"{path} has a broken weight index", "copy the folder again"
        files = _read_json(index, broken, remedy).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise InputError(f"{index}: no 'weight_map'; {remedy}")
        if not all(isinstance(name, str) for name in files.values()):
            raise InputError(f"{index}: 'weight_map' holds something other than file names; {remedy}")
        for name in sorted(set(files.values())):
            if Path(name).name != name or not (path / name).is_file():
                raise InputError(f"{index} names {name!r}, which is not in the folder; {remedy}")
    elif (path / "model.safetensors").exists():
        files = dict.fromkeys(_tensor_names(path / "model.safetensors"), "model.safetensors")
    elif sorted(path.glob("*.bin")) + sorted(path.glob("*.pth")):
        raise InputError(
            f"{path} has its weights as pickled .bin files; weights load from safetensors only: "
            "save the model again with safe_serialization=True"
        )
    else:
        raise InputError(
            f"{path} has no model.safetensors and no {INDEX}; copy the weights into the folder"
        )
    if any("mm_projector" in name for name in files):
        raise InputError(f"{path} holds weights in the original LLaVA layout; {CONVERT}")
    return files


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, "numpy") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is not a whole safetensors file ({_first_line(error)}); copy it again"
        ) from error


def _check_tensors(folder: Folder) -> None:
    """Names, shapes and dtypes from the files' headers, before anything is allocated."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(set(folder.files.values())):
        names = set(_tensor_names(folder.path / file))
        with safe_open(folder.path / file, "numpy") as handle:
            for name, home in folder.files.items():
                if home == file:
                    if name not in names:
                        raise InputError(
                            f"{folder.path / file}: tensor {name!r} is missing, which {INDEX} puts "
                            "there; copy the folder again"
                        )
                    part = handle.get_slice(name)
                    shapes[canonical(name)] = (tuple(part.get_shape()), part.get_dtype())
    missing = []
    for entry in entries(folder.config):
        if entry.name not in shapes:
            missing.append(entry.name)
            continue
        shape, dtype = shapes[entry.name]
        if shape != entry.shape:
            raise InputError(
                f"{folder.path}: tensor {folder.stored[entry.name]!r} has shape {list(shape)}, "
                f"config.json asks for {list(entry.shape)}; copy both from the same model"
            )
        if dtype not in ("F32", "F16", "BF16", "F64"):
            raise InputError(
                f"{folder.path}: tensor {folder.stored[entry.name]!r} is stored as {dtype}; "
                "wanted F32, F16 or BF16 (quantised weights are not read)"
            )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{folder.path}: tensor {missing[0]!r}{more} missing from the weights; copy the folder again"
        )


def _same_head(folder: Folder) -> bool:
    """Whether no head is stored beside the embedding, or one that equals it."""
    if HEAD not in folder.stored:
        return True
    read = Reader(folder)
    blocks = zip(read.rows(EMBEDDING), read.rows(HEAD), strict=True)
    return all(np.array_equal(one.astype(np.float32), other.astype(np.float32)) for one, other in blocks)


def _untied(folder: Folder) -> Folder:
    """The folder read with a head of its own."""
    decoder = replace(folder.config.decoder, tied=False)
    return replace(folder, config=replace(folder.config, decoder=decoder))


def _read_json(file: Path, otherwise: str, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{otherwise}: {file.name}: {_first_line(error)}; {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{otherwise}: {file.name} holds no object; {remedy}")
    return content


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
