"""PEFT adapters: LoRA terms and whole modules, as changes to their base folder."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mllm_align.errors import InputError, one_line, quoted, refusal
from mllm_align.files import read_json
from mllm_align.models.changes import Changes, LowRank, digest_of
from mllm_align.models.huggingface import Folder, Reader
from mllm_align.models.names import HEAD, SCORE_WEIGHT
from mllm_align.models.ranges import FLAG, Between, Maybe, Object, OneOf, Text, Whole, check, fields

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COPY = "copy the adapter again from where it came from"
MERGE = "merge it with PEFT (merge_and_unload) and give the merged folder"
NONE = OneOf((None, False))
FIELDS = {
    "peft_type": (None, OneOf(("LORA",))),
    "base_model_name_or_path": (None, Text(4096)),
    "r": (8, Whole(1, 1 << 16)),
    "lora_alpha": (8, Between(0, 1e9)),
    "use_rslora": (False, FLAG),
    "rank_pattern": (None, Maybe(Object())),
    "alpha_pattern": (None, Maybe(Object())),
    # What follows is computed for these values alone.
    "bias": ("none", OneOf(("none",))),
    "fan_in_fan_out": (False, NONE),
    "init_lora_weights": (True, OneOf((True, False, None, "gaussian"))),  # others change the base
    "use_dora": (False, NONE),
    "use_qalora": (False, NONE),
    "use_bdlora": (None, NONE),
    "lora_bias": (False, NONE),
    "trainable_token_indices": (None, NONE),
    "target_parameters": (None, NONE),
    "layer_replication": (None, NONE),
    "alora_invocation_tokens": (None, NONE),
    "arrow_config": (None, NONE),
    "monteclora_config": (None, NONE),
}
UNUSED = [name for name, (_, allowed) in FIELDS.items() if None in allowed]


class Adapter(Changes):
    """The changes of an adapter folder; `folder` is its base with them laid over it.

    Raises InputError where it asks for what is not computed here, or does not fit its base.
    """

    def __init__(self, path: Path, base: Folder):
        self.path, self.at, self.base = path, str(path / WEIGHTS), base
        self.settings = _settings(path)
        self.pairs: dict[str, dict[str, np.ndarray]] = {}
        self.modules: dict[str, str] = {}  # as PEFT calls them: patterns are of those names
        self.whole: dict[str, np.ndarray] = {}
        for stored, tensor in _tensors(path).items():
            self._take(stored.removeprefix("base_model.model."), tensor)
        self.scales = {name: self._scale(name, pair) for name, pair in self.pairs.items()}
        named = {f"{name} {side}": x for name, pair in self.pairs.items() for side, x in pair.items()}
        head = {} if self.score is None else {SCORE_WEIGHT: self.score}
        self.digest = digest_of(
            named | self.whole | head, *(self.scales[name] for name in sorted(self.scales))
        )

    @property
    def folder(self) -> Folder:
        return replace(self.base, changes=(*self.base.changes, self), named=self.path)

    def replacement(self, name: str) -> np.ndarray | None:
        whole = self.whole.get(name)
        return None if whole is None else whole.astype(np.float64)

    def low_rank(self, name: str) -> LowRank | None:
        if name not in self.pairs:
            return None
        a, b = (self.pairs[name][side].astype(np.float64) for side in "AB")
        return a, b, self.scales[name]

    def _take(self, stored: str, tensor: np.ndarray) -> None:
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise refusal(self.at, f"tensor {quoted(stored)} has numbers that are not finite", COPY)
        base = self.base
        module, low_rank, side = stored.rpartition(".lora_")
        if low_rank and side in ("A.weight", "B.weight"):
            name = base.family.canonical(f"{module}.weight")
            self._check(name, stored, base.family.embedding, *((HEAD,) if base.config.decoder.tied else ()))
            self.pairs.setdefault(name, {})[side[0]] = tensor
            self.modules[name] = module
            return
        name = base.family.canonical(
            stored.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
        )
        if name == SCORE_WEIGHT:
            if tensor.shape != (1, base.config.decoder.hidden):
                raise self._misfit(stored, tensor.shape, (1, base.config.decoder.hidden))
            self.score = tensor[0].astype(np.float32)
            return
        if low_rank or not name.startswith(tuple(base.family.connector.values())):
            problem = f"tensor {quoted(stored)} changes what is not computed from an adapter here"
            raise refusal(self.at, problem, MERGE)
        wanted = self._check(name, stored)
        if tensor.shape != wanted:
            raise self._misfit(stored, tensor.shape, wanted)
        self.whole[name] = tensor

    def _check(self, name: str, stored: str, *embeddings: str) -> tuple[int, ...]:
        """Shape of a tensor of the base."""
        if name in embeddings:
            raise refusal(self.at, f"tensor {quoted(stored)} trains an embedding", MERGE)
        if name not in self.base.stored:
            problem = f"tensor {quoted(stored)} is of a module that the base {self.base.path} has not"
            raise refusal(self.at, problem, "name the adapter's own base")
        return Reader(self.base).shape(name)

    def _scale(self, name: str, pair: dict[str, np.ndarray]) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank)."""
        module, shape = self.modules[name], self._check(name, self.modules[name])
        if set(pair) != {"A", "B"}:
            raise refusal(self.at, f"{quoted(module)} has one of lora_A and lora_B alone", COPY)
        rank, alpha = (
            self._of(module, *names) for names in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        wanted = {"A": (rank, shape[-1]), "B": (shape[0], rank)}
        for side, tensor in pair.items():
            if len(shape) != 2 or tensor.shape != wanted[side]:
                raise self._misfit(f"{module}.lora_{side}.weight", tensor.shape, wanted[side])
        return alpha / (math.sqrt(rank) if self.settings["use_rslora"] else rank)

    def _of(self, module: str, patterns: str, default: str) -> Any:
        """The value of the first pattern that a module's name ends in, as PEFT matches it."""
        for pattern, value in (self.settings[patterns] or {}).items():
            try:
                found = re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module)
            except re.error as error:
                at = str(self.path / CONFIG)
                raise refusal(at, f"{patterns} has no pattern {quoted(pattern)} ({error})", COPY) from error
            if found:
                allowed = FIELDS[default][1]
                return check(str(self.path / CONFIG), f"{patterns}.{pattern}", value, allowed, COPY)
        return self.settings[default]

    def _misfit(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> InputError:
        problem = (
            f"tensor {quoted(name)} has shape {list(found)}, the base and {CONFIG} ask for {list(wanted)}"
        )
        return refusal(self.at, problem, "name the adapter's own base")


def base_name(path: Path) -> str:
    return _settings(path)["base_model_name_or_path"]


def _settings(path: Path) -> dict[str, Any]:
    raw = read_json(path / CONFIG, COPY)
    # An empty list or object, too, says that a setting is not used.
    given = {name: None if value in ([], {}) and name in UNUSED else value for name, value in raw.items()}
    return fields(str(path / CONFIG), given, FIELDS, MERGE)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
        problem = "holds its weights as a pickled .bin file; weights load from safetensors only"
        raise refusal(str(path), problem, "save the adapter again with safe_serialization=True")
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise refusal(str(path / WEIGHTS), f"can't be read ({one_line(error, 160)})", COPY) from error
    if not tensors:
        raise refusal(str(path / WEIGHTS), "holds no tensors", COPY)
    wrong = next((name for name, x in tensors.items() if x.dtype.kind not in "fV" or not x.ndim), None)
    if wrong is not None:
        raise refusal(str(path / WEIGHTS), f"tensor {quoted(wrong)} is not floating", COPY)
    return tensors
