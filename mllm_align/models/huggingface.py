"""Hugging Face folders: read configuration and weights.

Folders are read as they are really published (see `ModelFamily.canonical` for the key layouts). Weights
come from safetensors only and no code from a folder is ever run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from mllm_align.errors import InputError, one_line
from mllm_align.files import read_json
from mllm_align.models.changes import Changes, laid_over
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.base import ModelFamily
from mllm_align.models.families.registry import family_of, read_config
from mllm_align.models.names import HEAD, SCORE_WEIGHT, Entry
from mllm_align.models.placed import placed

INDEX = "model.safetensors.index.json"
ROWS = 1024  # of a matrix, read at once where all of it is not needed


@dataclass(frozen=True)
class Folder:
    """A checked Hugging Face folder. Nothing but its configuration is read until it is asked for.

    changes: what was trained over its weights, in order; the model is the folder with those laid over it.
    named, step: the run or adapter that they come from, and which checkpoint of the run.
    """

    path: Path
    config: ModelConfig
    changes: tuple[Changes, ...] = ()
    named: Path | None = None
    step: int | None = None

    def kept(self, int8: bool) -> Folder:
        """The folder, to be read with the matrices of its blocks in int8, or in the computation's dtype."""
        return self if self.config.int8 == int8 else replace(self, config=replace(self.config, int8=int8))

    @property
    def family(self) -> ModelFamily[Any]:
        return family_of(self.config)

    @property
    def entries(self) -> Iterator[Entry]:
        """The tensors that the forward pass reads."""
        return self.family.entries(self.config)

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name as stored -> file name."""
        return _weight_files(self.path, self.family)

    @cached_property
    def stored(self) -> dict[str, str]:
        """Canonical name -> name as stored."""
        return {self.family.canonical(name): name for name in self.files}

    @cached_property
    def score(self) -> np.ndarray | None:
        """[D] float32: the head of a reward model, if it is one."""
        for each in reversed(self.changes):
            if each.score is not None:
                return each.score
        if SCORE_WEIGHT not in self.files:
            return None
        with safe_open(self.path / self.files[SCORE_WEIGHT], "numpy") as file:
            kernel = file.get_tensor(SCORE_WEIGHT)
        if kernel.shape != (1, self.config.decoder.hidden):
            problem = (
                f"has shape {list(kernel.shape)}, a reward model's is [1, {self.config.decoder.hidden}]"
            )
            raise InputError(f"{self.path}: tensor {SCORE_WEIGHT!r} {problem}; name a model with one score")
        return kernel[0].astype(np.float32)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of configuration and weights: names what a run stands on."""
        digest = hashlib.sha256()
        for name in ["config.json", *sorted(set(self.files.values()))]:
            digest.update(name.encode())
            with open(self.path / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for each in self.changes:
            digest.update(each.digest)
        return digest.hexdigest()[:16]

    @cached_property
    def projector_fingerprint(self) -> str:
        """Digest of the tensors between tower and decoder: where their training starts."""
        digest, read = hashlib.sha256(), Reader(self)
        for entry in self.entries:
            if entry.path[0] in self.family.connector:
                digest.update(entry.name.encode() + read(entry.name).tobytes())
        return digest.hexdigest()[:16]


def open_folder(path: str | Path) -> Folder:
    """Read the configuration of a folder and check that its weights are there.

    Raises InputError for a folder that is missing, is of no family computed here, is in another program's
    layout, uses a feature this project does not compute, or whose tensors are missing or misshapen.
    """
    folder = Folder(Path(path), read_config(path))
    apart = _untied(folder) if HEAD in folder.stored else folder
    _check_tensors(apart)
    # What is stored wins over the flag, as in transformers: a tied head may be there all the same.
    return folder if folder.config.decoder.tied and _same_head(folder) else apart


def load_params(
    folder: Folder,
    dtype: Any,
    sharding: Callable[[tuple[str, ...]], jax.sharding.Sharding] | None = None,
    only: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> dict[str, Any]:
    """The parameter tree, each leaf read slice by slice straight to the devices that keep it.

    sharding: leaf path -> where it lives (default: the first device); a `Quantised` of two for a matrix
    that is kept in int8. only: which leaves to read.
    """
    leaves: dict[tuple[str, ...], list[Entry]] = {}
    for entry in folder.entries:
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
        node[path[-1]] = placed(parts, reader, np.dtype(dtype), where)
    return tree


class Reader:
    """Reads tensors of a folder by canonical name: as stored, or in float64 where something was trained
    over them. A file is mapped only while one of them is read: what is mapped counts as memory of the
    process."""

    def __init__(self, folder: Folder):
        self.folder = folder

    def __call__(self, name: str) -> np.ndarray:
        stored = self.folder.stored[name]
        with safe_open(self.folder.path / self.folder.files[stored], "numpy") as file:
            return laid_over(file.get_tensor(stored), name, self.folder.changes)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self.folder.stored[name]
        with safe_open(self.folder.path / self.folder.files[stored], "numpy") as file:
            return tuple(file.get_slice(stored).get_shape())

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """A matrix as stored, in blocks of rows."""
        stored = self.folder.stored[name]
        with safe_open(self.folder.path / self.folder.files[stored], "numpy") as file:
            part = file.get_slice(stored)
            count = part.get_shape()[0]
            for start in range(0, count, ROWS):
                yield part[start : min(start + ROWS, count)]


# ---- weights ---------------------------------------------------------------------------------------


def _weight_files(path: Path, family: ModelFamily[Any]) -> dict[str, str]:
    index = path / INDEX
    if index.exists():
        remedy = "copy the folder again"
        files = read_json(index, remedy).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise InputError(f"{index}: no 'weight_map'; {remedy}")
        if not all(isinstance(name, str) for name in files.values()):
            raise InputError(f"{index}: 'weight_map' holds something other than file names; {remedy}")
        for name in sorted(set(files.values())):
            if Path(name).name != name or not os.path.isfile(path / name):
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
    if (what := family.foreign({}, files)) is not None:
        raise InputError(f"{path} {what}")
    return files


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, "numpy") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is not a whole safetensors file ({one_line(error, 160)}); copy it again"
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
                    shapes[folder.family.canonical(name)] = (tuple(part.get_shape()), part.get_dtype())
    missing = []
    for entry in folder.entries:
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
    blocks = zip(read.rows(folder.family.embedding), read.rows(HEAD), strict=True)
    return all(np.array_equal(one.astype(np.float32), other.astype(np.float32)) for one, other in blocks)


def _untied(folder: Folder) -> Folder:
    """The folder read with a head of its own."""
    decoder = replace(folder.config.decoder, tied=False)
    return replace(folder, config=replace(folder.config, decoder=decoder))
