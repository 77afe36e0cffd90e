"""What run.json says of a run: its model, its data, and what it was computed with."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from mllm_align.config import Config, part_files
from mllm_align.data.encode import Encoded
from mllm_align.data.mixture import Mixture
from mllm_align.models.bundle import Bundle
from mllm_align.models.huggingface import Folder
from mllm_align.prepare import name_weights
from mllm_align.training.run_model import open_base


def metadata(
    config: Config,
    bundle: Bundle,
    data: Any,
    held_out: Any,
    records: Sequence[Encoded],
    references: Sequence[Folder] = (),
) -> dict[str, Any]:
    """What run.json says of a run beside its config. references: as of `open_references`. Raises InputError
    for a judge that is no model."""
    name_weights(bundle.folder)
    digest = hashlib.sha256()  # of the texts alone: a run's order of batches hangs on their lengths
    for record in records:
        for ids in (ids for part in record.parts for ids in (part.prefix, *part.responses)):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return {
        **_model(bundle.folder),
        "model_fingerprint": bundle.folder.fingerprint,
        "projector_fingerprint": bundle.folder.projector_fingerprint,
        "data": _name(data),
        "data_fingerprint": digest.hexdigest()[:16],
        "data_weights": data.named if isinstance(data, Mixture) else None,
        "eval_data": _name(held_out),
        **_judge(config, bundle),
        **_references(references),
        "part_files": part_files(config),
        "dtype": str(bundle.dtype),
        "base_kept": bundle.kept,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python, of this program and of what it computes with."""
    names = ("mllm-align", "jax", "flax", "optax", "transformers")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this program itself, run from a checkout
        return "not installed"


def _model(folder: Folder) -> dict[str, Any]:
    """What `open_base` opens the same model from."""
    named = str((folder.named or folder.path).resolve())
    return {"model": named} if folder.step is None else {"model": named, "model_step": folder.step}


def _judge(config: Config, bundle: Bundle) -> dict[str, str]:
    """The folder of a judge, or of a reward model, that is not the policy's base."""
    annotator = None if config.online is None else config.online.annotator
    if annotator is None or annotator.model_folder is None:
        return {}
    folder = open_base(annotator.model_folder)
    if (
        not folder.changes
        and folder.path.resolve() == bundle.folder.path.resolve()
        and not bundle.folder.changes
    ):
        folder = bundle.folder  # digested already
    name_weights(folder)
    return {"judge": _model(folder)["model"], "judge_fingerprint": folder.fingerprint}


def _references(folders: Sequence[Folder]) -> dict[str, str]:
    if not folders:
        return {}
    return {
        "references": ", ".join(_model(folder)["model"] for folder in folders),
        "references_fingerprint": " ".join(folder.fingerprint for folder in folders),
    }


def _name(data: Any) -> str | None:
    if data is None:
        return None
    if isinstance(data, Mixture):
        return " ".join(f"{_name(file)}:{weight:g}" for file, weight in data.weights.items())
    if not isinstance(data, str | Path):
        return "rows given in memory"
    return str(Path(data).resolve() if os.path.exists(data) else data)
