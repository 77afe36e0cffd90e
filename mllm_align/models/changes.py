"""What was trained over a folder's weights, tensor by tensor: float64, shaped as the folder stores it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from mllm_align.errors import InputError, refusal
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.registry import family_of
from mllm_align.models.names import HEAD, Entry
from mllm_align.models.policy import SCORE

Leaves = dict[tuple[str, ...], Any]
LowRank = tuple[np.ndarray, np.ndarray, float]


class Changes:
    """Tensors are called by their canonical names (`ModelFamily.canonical`)."""

    digest: bytes
    """Of all numbers that are changed."""
    score: np.ndarray | None = None
    """[D]: the head that makes a reward model of it."""

    def replacement(self, name: str) -> np.ndarray | None:
        """The whole tensor anew."""
        raise NotImplementedError

    def low_rank(self, name: str) -> LowRank | None:
        """a [rank, in], b [out, rank], scale: what scale * (b @ a) adds to a weight [out, in]."""
        raise NotImplementedError

    def update(self, name: str) -> np.ndarray | None:
        terms = self.low_rank(name)
        return None if terms is None else (terms[2] * terms[1]) @ terms[0]


class Trained(Changes):
    """A run's tree: {"params": replaced leaves, "lora": low-rank terms}, as in `models.policy`.

    Raises InputError where it does not fit the model.
    """

    def __init__(self, config: ModelConfig, trained: dict, scale: float):
        self.scale = scale
        self.params: Leaves = flatten_dict(trained.get("params") or {})  # type: ignore[assignment]
        self.lora: Leaves = flatten_dict(trained.get("lora") or {})  # type: ignore[assignment]
        if SCORE in trained:
            self.score = np.asarray(trained[SCORE]["kernel"], np.float32)
        family = family_of(config)
        self.entries = {entry.name: entry for entry in family.entries(config)}
        if config.decoder.tied:  # a folder may store the tied head all the same
            self.entries[HEAD] = self.entries[family.embedding]
        known = {entry.path for entry in self.entries.values()}
        unknown = {*self.params, *((*path[:-1], "kernel") for path in self.lora)} - known
        if unknown:
            raise _misfit(min(unknown))

    @property
    def digest(self) -> bytes:  # type: ignore[override]
        named = {".".join(path): leaf for part in (self.params, self.lora) for path, leaf in part.items()}
        named |= {} if self.score is None else {SCORE: self.score}
        return digest_of(named, self.scale)

    def replacement(self, name: str) -> np.ndarray | None:
        entry = self.entries.get(name)
        leaf = None if entry is None else self.params.get(entry.path)
        return None if entry is None or leaf is None else _turned(entry, _exact(leaf, entry.layer))

    def low_rank(self, name: str) -> LowRank | None:
        entry = self.entries.get(name)
        if entry is None or entry.path[-1] != "kernel" or (*entry.path[:-1], "a") not in self.lora:
            return None
        a, b = (_exact(self.lora[*entry.path[:-1], side], entry.layer).T for side in "ab")
        if (b.shape[0], a.shape[1]) != entry.shape:
            raise _misfit(entry.path)
        return a, b, self.scale


def laid_over(old: np.ndarray, name: str, changes: Iterable[Changes]) -> np.ndarray:
    """The tensor after all changes, in their order: float64, or `old` itself where none is of it."""
    new = old
    for each in changes:
        whole, update = each.replacement(name), each.update(name)
        if whole is not None:
            new = whole
        if update is not None:
            new = (new.astype(np.float64) if new is old else new) + update
    return new


def digest_of(named: Mapping[str, Any], *settings: float) -> bytes:
    digest = hashlib.sha256(repr(settings).encode())
    for name in sorted(named):
        leaf = np.ascontiguousarray(named[name])
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.digest()


def _exact(leaf: Any, layer: int | None) -> np.ndarray:
    """A copy: what is merged is added in place."""
    return np.array(leaf if layer is None else leaf[layer], np.float64)


def _turned(entry: Entry, ours: np.ndarray) -> np.ndarray:
    if ours.shape != entry.to_ours(np.empty(entry.shape, bool)).shape:
        raise _misfit(entry.path)
    return entry.to_theirs(ours)


def _misfit(path: tuple[str, ...]) -> InputError:
    at = f"trained parameter {'.'.join(path)}"
    return refusal(at, "the model folder has no such tensor", "name the folder the run started from")
