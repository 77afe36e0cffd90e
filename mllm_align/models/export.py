"""Trained weights as other programs load them: a whole Hugging Face folder, or a PEFT adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mllm_align.errors import NotFinite, refusal
from mllm_align.files import new_folder, read_json
from mllm_align.models.changes import Changes, LowRank, Trained, laid_over
from mllm_align.models.huggingface import INDEX, Folder, Reader
from mllm_align.models.names import SCORE_WEIGHT, Entry, decoder_linears

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(np.float16),
}
FLOATS = (*DTYPES.values(), np.dtype(np.float64))
A, B = ".lora_A.weight", ".lora_B.weight"
# Weights beside those that were read: untrained, and a loader may prefer them to the trained ones.
OTHER_WEIGHTS = (".bin", ".bin.index.json", ".pth", ".pt", ".safetensors")


def export_merged(
    folder: Folder, out: Path, trained: dict, lora_scale: float, dtype: str | None = None
) -> dict[str, Any]:
    """Write `folder` again at `out` with what was trained in place: W + lora_scale * (a @ b). Of a reward
    model the head is written, too, as a sequence classifier's `score`.

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
    `trained` does not fit the folder; where float16 would overflow. Raises NotFinite where a trained tensor
    is not finite. Nothing is left at `out` then.
    """
    _refuse_inside(folder, out)
    changes = *folder.changes, Trained(folder.config, trained, lora_scale)
    target, report, score = _dtype(dtype), _Report(), changes[-1].score
    with new_folder(out) as partial:
        *_, last = files = sorted(set(folder.files.values()))
        for file in files:
            with safe_open(folder.path / file, "numpy") as handle:
                names, metadata = list(handle.keys()), handle.metadata()
                tensors = {
                    n: _exported(folder, n, handle.get_tensor(n), changes, target, report) for n in names
                }
            if score is not None and file == last:
                tensors[SCORE_WEIGHT] = score[None]  # float32, as it is computed
                report.replaced += 1
            _save(tensors, partial / file, metadata)
        _copy_others(folder, partial)
        if score is not None:
            _rewrite(partial / INDEX, lambda index: index["weight_map"].update({SCORE_WEIGHT: last}))
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
    """Write the low-rank terms, and the projector if it was trained, as a PEFT adapter of `folder`; of a
    reward model the head, too, as a sequence classifier's `score`.

    trained: as for `export_merged`; rank, alpha, targets: as it was trained with. Tensors are float32
    unless dtype is given. Returns `tensors` (their count), `dtype`, `target_modules`, `modules_to_save`.

    Raises InputError where there are no low-rank terms, where anything but the projector was trained
    beside them, and for `out`, misfits and overflow as `export_merged`. Raises ValueError where rank or
    targets are not those of the terms.
    """
    _refuse_inside(folder, out)
    last, target = Trained(folder.config, trained, alpha / rank), _dtype(dtype or "float32")
    _check_terms(last, rank, targets)
    tensors = dict(_adapter_tensors(folder, (*folder.changes, last)))
    if folder.changes:  # the terms of all of them side by side, their scales within
        rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith(A))
        alpha, linears = float(rank), decoder_linears(folder.config.decoder).items()
        targets = tuple(ours for ours, (theirs, *_) in linears if any(theirs in name for name in tensors))
    projector = any(name.startswith(folder.family.modules["projector"]) for name in tensors)
    config = _adapter_config(folder, rank, alpha, targets, projector, last.score is not None)
    named = {f"base_model.model.model.{name}": _cast(name, x, target) for name, x in tensors.items()}
    if last.score is not None:
        named[f"base_model.model.{SCORE_WEIGHT}"] = last.score[None]
    with new_folder(out) as partial:
        _save(named, partial / "adapter_model.safetensors")
        _write_json(partial / "adapter_config.json", config)
    told = {key: config[key] for key in ("target_modules", "modules_to_save")}
    return {"tensors": len(named), "dtype": dtype or "float32", **told}


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
    folder: Folder,
    stored: str,
    old: np.ndarray,
    changes: tuple[Changes, ...],
    target: np.dtype | None,
    report: _Report,
) -> np.ndarray:
    """The tensor as it goes out; what happened to it goes into the report."""
    dtype = target if target is not None and old.dtype in FLOATS else old.dtype
    name = folder.family.canonical(stored)
    exact = laid_over(old, name, changes)
    if exact is not old and not np.isfinite(exact).all():
        raise NotFinite(
            f"tensor {stored} is not finite with what was trained; look at the run's base folder"
        )
    new = _cast(stored, exact, dtype)
    if exact is old:
        report.copied += 1
    else:
        merged = any(each.low_rank(name) is not None for each in changes)
        report.rounded(new - exact, exact - old)
        report.replaced += not merged
        report.merged += merged
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


def _check_terms(changes: Trained, rank: int, targets: tuple[str, ...]) -> None:
    """PEFT loads an adapter whose configuration names other modules without a word."""
    if not changes.lora:
        raise refusal("adapter", "the run trained no LoRA", "export the merged folder instead")
    found = {path[-2] for path in changes.lora}
    ranks = {leaf.shape[-1] for path, leaf in changes.lora.items() if path[-1] == "a"}
    if found != set(targets) or ranks != {rank}:
        raise ValueError(f"trained: {sorted(found)} of rank {ranks}; told: {sorted(targets)} of {rank}")


def _adapter_tensors(folder: Folder, changes: tuple[Changes, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Names of transformers' modules, as PEFT itself stores them (torch keeps [out, in])."""
    family, projector, read = folder.family, False, Reader(folder)
    for name in folder.stored:
        if any(each.replacement(name) is not None for each in changes):
            if not name.startswith(family.modules["projector"]):
                problem = f"it can't carry the {name} that was trained"
                raise refusal("adapter", problem, "export the merged folder instead")
            projector = True
        elif not name.startswith(f"{family.modules['decoder']}.layers.") and any(
            each.low_rank(name) for each in changes
        ):
            problem = f"it can't carry the low-rank terms of {name}"
            raise refusal("adapter", problem, "export the merged folder instead")
    parts = [_ranks(folder, each) for each in changes] if len(changes) > 1 else []
    for entry in folder.entries:
        terms = [each.low_rank(entry.name) for each in changes]
        if any(each is not None for each in terms):
            yield from _side_by_side(entry, terms, parts)
        elif projector and entry.path[0] == "projector":  # PEFT wants the module whole
            yield entry.name, laid_over(read(entry.name), entry.name, changes)


def _ranks(folder: Folder, changes: Changes) -> int:
    """The largest rank of its terms."""
    found = (changes.low_rank(entry.name) for entry in folder.entries)
    return max((len(terms[0]) for terms in found if terms is not None), default=0)


def _side_by_side(
    entry: Entry, terms: list[LowRank | None], ranks: list[int]
) -> Iterator[tuple[str, np.ndarray]]:
    """One pair of matrices whose product is the sum of all terms; one alone stays as it is."""
    module, (out, inner) = entry.name.removesuffix(".weight"), entry.shape
    if len(terms) == 1 and terms[0] is not None:
        a, b, _ = terms[0]
        yield module + A, a
        yield module + B, b
        return
    a, b = np.zeros((sum(ranks), inner)), np.zeros((out, sum(ranks)))
    for start, each in zip(np.cumsum([0, *ranks]), terms, strict=False):
        if each is not None:
            rows = slice(start, start + len(each[0]))
            a[rows], b[:, rows] = each[0], each[2] * each[1]
    yield module + A, a
    yield module + B, b


def _adapter_config(
    folder: Folder, rank: int, alpha: float, targets: tuple[str, ...], projector: bool, score: bool
) -> dict[str, Any]:
    linears, modules = decoder_linears(folder.config.decoder), folder.family.modules
    maps = "|".join(linears[name][0].replace(".", r"\.") for name in targets)
    return {
        "base_model_name_or_path": str(folder.path.resolve()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": [modules["projector"]] * projector + ["score"] * score or None,
        "peft_type": "LORA",
        "r": rank,
        # Only the decoder's: the vision tower has maps of the same names.
        "target_modules": rf".*\b{re.escape(modules['decoder'])}\..*\blayers\.\d+\.(?:{maps})",
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
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
