"""Trained weights as other programs load them: a whole Hugging Face folder, or a PEFT adapter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mllm_align.errors import InputError, refusal
from mllm_align.files import new_folder, read_json
from mllm_align.models.huggingface import INDEX, Folder, Reader
from mllm_align.models.names import Entry, canonical, decoder_linears, entries

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
}
FLOATS = (*DTYPES.values(), np.dtype(np.float64))
# Weights beside those that were read: untrained, and a loader may prefer them to the trained ones.
OTHER_WEIGHTS = (".bin", ".bin.index.json", ".pth", ".pt", ".safetensors")


def export_merged(
    folder: Folder, out: Path, trained: dict, lora_scale: float, dtype: str | None = None
) -> dict[str, Any]:
    """Write `folder` again at `out` with what was trained in place: W + lora_scale * (a @ b).

    trained: {"params": replaced leaves, "lora": low-rank terms}, as in `models.policy`; either may be
    absent. Names, shard files, index and dtypes stay as stored; dtype ("float32", "bfloat16" or
    "float16") recasts every floating tensor. Tensors that were not trained are copied bit for bit, and
    the folder's other files with them, but for weights that were not read (pickles), hidden files and
    subfolders.

    Returns the counts of tensors `merged`, `replaced` and `copied`; `dtype` of the floating ones;
    `rounding`: `max_abs`, the largest |stored - exact| in a trained tensor, and
    `max_relative_to_update`, the largest rms(stored - exact) / rms(update) of one: the share of what was
    learned that the stored dtype loses.

    Raises InputError where `out` is not empty, is `folder` or inside it, or can't be written; where
    `trained` does not fit the folder; where float16 would overflow. Nothing is left at `out` then.
    """
    _refuse_inside(folder, out)
    changes, target, report = _Changes(folder, trained, lora_scale), _dtype(dtype), _Report()
    with new_folder(out) as partial:
        for file in sorted(set(folder.files.values())):
            with safe_open(folder.path / file, "numpy") as handle:
                names, metadata = list(handle.keys()), handle.metadata()
                tensors = {n: _exported(n, handle.get_tensor(n), changes, target, report) for n in names}
            _save(tensors, partial / file, metadata)
        _copy_others(folder, partial)
        if target is not None:
            _rewrite(partial / "config.json", lambda config: _name_dtype(config, target.name))
            _rewrite(partial / INDEX, lambda index: _name_size(index, report.size))
    return report.summary()


def export_adapter(
    folder: Folder,
    out: Path,
    trained: dict,
    rank: int,
    alpha: float,
    targets: tuple[str, ...],
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write the low-rank terms, and the projector if it was trained, as a PEFT adapter of `folder`.

    trained: as for `export_merged`; rank, alpha, targets: as it was trained with. Tensors are float32
    unless dtype is given. Returns `tensors` (their count), `dtype`, `target_modules`, `modules_to_save`.

    Raises InputError where there are no low-rank terms, where anything but the projector was trained
    beside them, and for `out`, misfits and overflow as `export_merged`. Raises ValueError where rank or
    targets are not those of the terms.
    """
    _refuse_inside(folder, out)
    changes, target = _Changes(folder, trained, alpha / rank), _dtype(dtype or "float32")
    _refuse_beyond_adapter(changes)
    _check_terms(changes, rank, targets)
    config = _adapter_config(folder, rank, alpha, targets, bool(changes.params))
    with new_folder(out) as partial:
        tensors = {
            f"base_model.model.model.{name}": _cast(name, exact, target)
            for name, exact in _adapter_tensors(folder, changes)
        }
        _save(tensors, partial / "adapter_model.safetensors")
        _write_json(partial / "adapter_config.json", config)
    told = {key: config[key] for key in ("target_modules", "modules_to_save")}
    return {"tensors": len(tensors), "dtype": dtype or "float32", **told}


# ---- what was trained ------------------------------------------------------------------------------


Leaves = dict[tuple[str, ...], Any]


class _Changes:
    """What a run trained, tensor by tensor: in float64, shaped as the folder stores it."""

    def __init__(self, folder: Folder, trained: dict, scale: float):
        self.scale = scale
        self.params: Leaves = flatten_dict(trained.get("params") or {})  # type: ignore[assignment]
        self.lora: Leaves = flatten_dict(trained.get("lora") or {})  # type: ignore[assignment]
        self.entries = {entry.name: entry for entry in entries(folder.config)}
        if folder.config.decoder.tied:
            # A folder may store the tied head all the same; transformers unties it if the two differ.
            self.entries["lm_head.weight"] = self.entries["language_model.embed_tokens.weight"]
        known = {entry.path for entry in self.entries.values()}
        unknown = {*self.params, *((*path[:-1], "kernel") for path in self.lora)} - known
        if unknown:
            raise _misfit(min(unknown))

    def replacement(self, entry: Entry) -> np.ndarray | None:
        """The trained leaf."""
        leaf = self.params.get(entry.path)
        return None if leaf is None else _turned(entry, _exact(leaf, entry.layer))

    def update(self, entry: Entry) -> np.ndarray | None:
        """scale * (a @ b)."""
        terms = self.terms(entry)
        if terms is None:
            return None
        a, b = terms
        return _turned(entry, ((self.scale * b).T @ a.T).T)  # laid out in memory as stored: faster

    def terms(self, entry: Entry) -> tuple[np.ndarray, np.ndarray] | None:
        """The low-rank terms of a linear map, in our orientation: a [in, rank], b [rank, out]."""
        *block, kind = entry.path
        if kind != "kernel" or (*block, "a") not in self.lora:
            return None
        a, b = self.lora[*block, "a"], self.lora[*block, "b"]
        return _exact(a, entry.layer), _exact(b, entry.layer)


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


# ---- merged folder ---------------------------------------------------------------------------------


@dataclass
class _Report:
    merged: int = 0
    replaced: int = 0
    copied: int = 0
    size: int = 0
    dtypes: set[str] = field(default_factory=set)
    max_abs: float = 0.0
    share_lost: float = 0.0

    def rounded(self, error: np.ndarray, update: np.ndarray) -> None:
        self.max_abs = max(self.max_abs, float(error.max()), -float(error.min()))
        norm = np.linalg.norm(update)
        if norm > 0:
            self.share_lost = max(self.share_lost, float(np.linalg.norm(error) / norm))

    def summary(self) -> dict[str, Any]:
        return {
            "merged": self.merged,
            "replaced": self.replaced,
            "copied": self.copied,
            "dtype": ", ".join(sorted(self.dtypes)),
            "rounding": {"max_abs": self.max_abs, "max_relative_to_update": self.share_lost},
        }


def _exported(
    name: str, old: np.ndarray, changes: _Changes, target: np.dtype | None, report: _Report
) -> np.ndarray:
    """The tensor as it goes out; what happened to it goes into the report."""
    dtype = target if target is not None and old.dtype in FLOATS else old.dtype
    entry = changes.entries.get(canonical(name))
    replacement = None if entry is None else changes.replacement(entry)
    update = None if entry is None else changes.update(entry)
    if replacement is None and update is None:
        new = _cast(name, old, dtype)
        report.copied += 1
    else:
        exact = old.astype(np.float64) if replacement is None else replacement
        if update is not None:
            exact += update
        new = _cast(name, exact, dtype)
        report.rounded(new - exact, exact - old)
        report.replaced += update is None
        report.merged += update is not None
    report.size += new.nbytes
    if new.dtype in FLOATS:
        report.dtypes.add(new.dtype.name)
    return new


def _copy_others(folder: Folder, out: Path) -> None:
    for file in folder.path.iterdir():
        hidden, weights = file.name.startswith("."), file.name.endswith(OTHER_WEIGHTS)
        if file.is_file() and not hidden and not weights:
            shutil.copyfile(file, out / file.name)


def _name_dtype(config: dict[str, Any], dtype: str) -> None:
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and key in part:
                part[key] = dtype


def _name_size(index: dict[str, Any], size: int) -> None:
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] = size


# ---- adapter ---------------------------------------------------------------------------------------


def _refuse_beyond_adapter(changes: _Changes) -> None:
    if not changes.lora:
        raise refusal("adapter", "the run trained no LoRA", "export the merged folder instead")
    beyond = sorted({path[0] for path in changes.params} - {"projector"})
    if beyond:
        problem = f"it can't carry the {', '.join(beyond)} that the run trained"
        raise refusal("adapter", problem, "export the merged folder instead")


def _check_terms(changes: _Changes, rank: int, targets: tuple[str, ...]) -> None:
    """PEFT loads an adapter whose configuration names other modules without a word."""
    found = {path[-2] for path in changes.lora}
    ranks = {leaf.shape[-1] for path, leaf in changes.lora.items() if path[-1] == "a"}
    if found != set(targets) or ranks != {rank}:
        raise ValueError(f"trained: {sorted(found)} of rank {ranks}; told: {sorted(targets)} of {rank}")


def _adapter_tensors(folder: Folder, changes: _Changes) -> Iterator[tuple[str, np.ndarray]]:
    """Names of transformers' modules, as PEFT itself stores them (torch keeps [out, in])."""
    read = Reader(folder)
    for entry in entries(folder.config):
        terms = changes.terms(entry)
        if terms is not None:
            module = entry.name.removesuffix(".weight")
            yield f"{module}.lora_A.weight", terms[0].T
            yield f"{module}.lora_B.weight", terms[1].T
        elif changes.params and entry.path[0] == "projector":  # PEFT wants the module whole
            new = changes.replacement(entry)
            yield entry.name, read(entry.name) if new is None else new


def _adapter_config(
    folder: Folder, rank: int, alpha: float, targets: tuple[str, ...], projector: bool
) -> dict[str, Any]:
    linears = decoder_linears(folder.config)
    maps = "|".join(linears[name][0].replace(".", r"\.") for name in targets)
    return {
        "base_model_name_or_path": str(folder.path.resolve()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": ["multi_modal_projector"] if projector else None,
        "peft_type": "LORA",
        "r": rank,
        # Only the decoder's: the vision tower has maps of the same names.
        "target_modules": rf".*\blanguage_model\..*\blayers\.\d+\.(?:{maps})",
        "task_type": "CAUSAL_LM",
    }


# ---- writing ---------------------------------------------------------------------------------------


def _refuse_inside(folder: Folder, out: Path) -> None:
    source, place = Path(os.path.realpath(folder.path)), Path(os.path.realpath(out))
    if source in (place, *place.parents):
        raise refusal(str(out), f"this is in the model folder {folder.path}", "name a place outside it")


def _dtype(name: str | None) -> np.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise refusal("dtype", f"{name!r} is not known", f"name one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _cast(name: str, exact: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Contiguous, as safetensors takes it for granted. Raises InputError if a number becomes infinite."""
    with np.errstate(over="ignore"):
        new = exact.astype(dtype, order="C", copy=False)
    if new.dtype != exact.dtype and (np.isinf(new) & np.isfinite(exact)).any():
        raise refusal(f"tensor {name}", f"overflows {new.dtype}", "use --dtype bfloat16 or float32")
    return new


def _save(tensors: dict[str, np.ndarray], file: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, file, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # the library's name for a full disk
        raise OSError(f"{file.name}: {error}") from error


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if file.exists():
        content = read_json(file, "copy the folder again")
        change(content)
        _write_json(file, content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
