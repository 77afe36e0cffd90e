"""A run folder: what was asked, on which model and data, and what came of it.

config.json    the resolved configuration
run.json       model folder and fingerprint, data, versions, device
log.jsonl      one line for every event: start, train, example, eval, save, done
checkpoints/   trained parameters and optimizer state
reference.npz  reference log-probs, if they were computed beforehand
answers/       what an endpoint said of the policy's responses, if one is the annotator
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mllm_align import processes
from mllm_align.config import (
    Config,
    Endpoint,
    JudgeModel,
    OnlineBDHS,
    OnlinePairs,
    from_json,
    save_json,
    to_json,
)
from mllm_align.data.encode import Encoded
from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import new_file, read_json
from mllm_align.models.bundle import Bundle, load
from mllm_align.models.export import export_adapter, export_merged
from mllm_align.models.huggingface import Folder, open_folder
from mllm_align.prepare import name_weights
from mllm_align.training.checkpoint import Checkpoints, Which, choose, kept
from mllm_align.training.optim import abstract_trained

# What may change between a run and its continuation: nothing that moves a number.
MAY_CHANGE = ("log_every", "eval_every", "save_every", "keep", "tensorboard", "checkpoints")
# These move a number by rounding alone: another machine may need others.
MAY_CHANGE += ("mesh", "distributed", "micro_batches", "remat", "nonfinite")
DATA_MAY_CHANGE = ("threads", "prefetch")
# How an endpoint is reached, not what it says.
ENDPOINT_MAY_CHANGE = ("url", "key_variable", "concurrency", "timeout", "retries", "budget")


def facts(
    config: Config, bundle: Bundle, data: Any, held_out: Any, records: Sequence[Encoded]
) -> dict[str, Any]:
    """What run.json says of a run beside its config. Raises InputError for a judge that is no model."""
    name_weights(bundle.folder)
    digest = hashlib.sha256()  # of the texts alone: a run's order of batches hangs on their lengths
    for record in records:
        for ids in (record.prefix, *record.responses):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return {
        "model": str(bundle.folder.path.resolve()),
        "model_fingerprint": bundle.folder.fingerprint,
        "projector_fingerprint": bundle.folder.projector_fingerprint,
        "data": _name(data),
        "data_fingerprint": digest.hexdigest()[:16],
        "eval_data": _name(held_out),
        **_judge(config, bundle),
        "dtype": str(bundle.dtype),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mllm-align", "jax", "flax", "optax", "transformers")},
        },
    }


def _judge(config: Config, bundle: Bundle) -> dict[str, str]:
    """The folder of a judge that is not the policy's base."""
    online = config.online
    if not isinstance(online, OnlinePairs) or not isinstance(online.annotator, JudgeModel):
        return {}
    if online.annotator.model is None:
        return {}
    folder = open_folder(online.annotator.model)
    if folder.path.resolve() == bundle.folder.path.resolve():
        folder = bundle.folder  # digested already
    name_weights(folder)
    return {"judge": str(folder.path.resolve()), "judge_fingerprint": folder.fingerprint}


def _name(data: Any) -> str | None:
    if data is None:
        return None
    return str(Path(data).resolve()) if isinstance(data, str | Path) else "rows given in memory"


def check_folder(out: Path, config: Config) -> None:
    """Refuse a run folder that is something else, or a run of another configuration."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out names a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / "config.json").exists():
        raise InputError(f"{out} holds other files; give --out a new folder, or one of an earlier run")
    _check_config(out, read_config(out), config)


def _check_config(out: Any, saved: Config, now: Config) -> None:
    old, new = (_flat(to_json(_settled(c))) for c in (saved, now))
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differ:
        raise InputError(
            f"{out} was started with another configuration ({', '.join(sorted(differ))} differ); "
            "take those back, or give --out a new folder"
        )


def _settled(config: Config) -> Config:
    """The config with all that may change at a restart set to its default."""
    plain = Config()
    data = replace(config.data, **{n: getattr(plain.data, n) for n in DATA_MAY_CHANGE})
    online = config.online
    if isinstance(online, OnlinePairs | OnlineBDHS):
        online = replace(online, mesh=None)
    if isinstance(online, OnlinePairs) and isinstance(online.annotator, Endpoint):
        reached = {n: getattr(Endpoint(), n) for n in ENDPOINT_MAY_CHANGE}
        online = replace(online, annotator=replace(online.annotator, **reached))
    return replace(config, data=data, online=online, **{n: getattr(plain, n) for n in MAY_CHANGE})


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return out


NO_RUN = "give a run folder that is whole, or --out a new one"


def read_config(out: Path) -> Config:
    return from_json(read_json(out / "config.json", f"{out} is no run folder: {NO_RUN}"))


def read_facts(out: Path) -> dict[str, Any]:
    """What run.json says. Raises InputError where it does not say what a run needs."""
    facts = read_json(out / "run.json", f"{out} is no run folder: {NO_RUN}")
    for name in ("model", "model_fingerprint"):
        if not isinstance(facts.get(name), str):
            raise refusal(str(out / "run.json"), f"{name} is {one_line(facts.get(name))}", NO_RUN)
    return facts


def check(out: Path, described: dict[str, Any]) -> None:
    """Refuse to continue a run of another model or other data."""
    if (out / "run.json").exists():
        _check_same(out, read_facts(out), described)


def _check_same(out: Any, saved: dict[str, Any], described: dict[str, Any]) -> None:
    for what, name in (
        ("from another model", "model"),
        ("from another projector", "projector"),
        ("on other data", "data"),
        ("with another judge", "judge"),
    ):
        found, now = (d.get(f"{name}_fingerprint") for d in (saved, described))
        if found != now:
            first = f"{saved.get(name, name)}, fingerprint {found}"
            raise InputError(
                f"{out} was started {what} ({first}; this one is {now}); give its {name}, or --out a new "
                "folder"
            )


def check_checkpoint(
    place: Any, checkpoints: Checkpoints, step: int, config: Config, described: dict[str, Any]
) -> None:
    """The same of what a checkpoint says of itself: it may have come from elsewhere."""
    if step:
        about = checkpoints.about(step)
        _check_config(place / str(step), from_json(about["config"]), config)
        _check_same(place / str(step), about, described)


def checkpoints_folder(out: Path, config: Config) -> epath.Path:
    if config.checkpoints is None:
        return epath.Path(out.resolve()) / "checkpoints"
    place = epath.Path(config.checkpoints)
    return place if "://" in config.checkpoints else place.resolve()


def start(out: Path, config: Config, described: dict[str, Any]) -> None:
    """Make the run folder, if it is not there."""
    if (out / "run.json").exists():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"can't make the run folder {out}: {one_line(error)}; give another --out"
        ) from error
    with new_file(out / "config.json") as file:
        file.write(save_json(config))
    with new_file(out / "run.json") as file:
        file.write(json.dumps(described, indent=2) + "\n")


def open_run(out: str | Path, step: Which = "last") -> tuple[Config, Folder, Checkpoints, int]:
    """(config, base folder, checkpoints, the step asked for). Only whole checkpoints count: of damaged ones
    stderr tells, and the next one is taken, unless a step was asked for by its number."""
    out = Path(out)
    config, described = read_config(out), read_facts(out)
    folder = open_folder(described["model"])
    name_weights(folder)
    if folder.fingerprint != described["model_fingerprint"]:
        raise InputError(
            f"{folder.path} has changed since {out} was trained from it (fingerprint {folder.fingerprint}, "
            f"was {described['model_fingerprint']}); put the original back"
        )
    place = checkpoints_folder(out, config)
    return config, folder, Checkpoints(place), processes.on_first(lambda: _chosen(out, place, step))


def _chosen(out: Path, place: epath.Path, wanted: Which) -> int:
    """The step to read. Raises InputError where there is none."""
    step, damaged = choose(place, wanted)
    asked = [problem for number, problem in damaged if number == wanted]
    if asked:
        remedy = "take another step, or `last`"
        raise InputError(f"checkpoint {place / str(wanted)} is damaged ({asked[0]}); {remedy}")
    for number, problem in damaged:
        taken = "it is left out" if step is None else f"step {step} is taken"
        print(f"checkpoint {place / str(number)} is damaged ({problem}); {taken}", file=sys.stderr)
    if step is not None:
        return step
    left = sorted(set(kept(place)) - {number for number, _ in damaged})
    if wanted == "last" or not left:
        raise InputError(f"{out} has no whole checkpoint yet; train it first")
    why = "no step was evaluated" if wanted == "best" else f"it has {', '.join(map(str, left))}"
    raise InputError(f"{out} has no checkpoint {one_line(wanted)}: {why}; take another, or `last`")


def load_run(out: str | Path, dtype: Any = "auto", mesh: Any = None, step: Which = "last") -> Bundle:
    """The model of a run's checkpoint (the newest, the best evaluated, or a step), ready to score."""
    config, folder, checkpoints, number = open_run(out, step)
    with closing(checkpoints):
        bundle = replace(load(folder.path, dtype, mesh), folder=folder)  # whose weights are digested
        trained = checkpoints.restore_trained(number, abstract_trained(config, bundle.config, bundle.mesh))
    return replace(bundle, trained=trained, lora=config.lora)


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    step: Which = "last",
) -> dict[str, Any]:
    """Write a run's checkpoint as a Hugging Face folder, or as a PEFT adapter.

    Returns what was written: counts of tensors and, for a merge into 16 bits, what rounding cost.
    """
    config, folder, checkpoints, number = open_run(run, step)
    with closing(checkpoints):
        trained = checkpoints.restore_trained(number)
    out = Path(out)
    lora = config.lora
    if adapter:
        if lora is None:
            raise InputError(
                f"{run} trained the parameters themselves: it has no adapter; export without --adapter"
            )
        report = export_adapter(folder, out, trained, lora.rank, lora.alpha, lora.targets, dtype)
    else:
        report = export_merged(folder, out, trained, 1.0 if lora is None else lora.scale, dtype)
    return {"step": number, **report}
