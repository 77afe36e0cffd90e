"""A run as a model: what it started from, what it has trained over that, and its export."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from etils import epath

from mllm_align import processes
from mllm_align.config import Config, OnlineRewards
from mllm_align.errors import InputError, one_line, refusal
from mllm_align.locks import alone
from mllm_align.models.bundle import OTHERS, Bundle, load
from mllm_align.models.changes import Trained
from mllm_align.models.export import export_adapter, export_merged
from mllm_align.models.huggingface import Folder
from mllm_align.models.policy import SCORE, VALUE, policy_alone
from mllm_align.models.sources import open_model
from mllm_align.prepare import name_weights
from mllm_align.training.checkpoint import Checkpoints, Which, choose, kept
from mllm_align.training.optim import abstract_trained, init_trained, value_config
from mllm_align.training.run_folder import check_checkpoint, checkpoints_folder, read_config, read_metadata


def open_base(model: str | Path, step: Which = "last", within: tuple[Path, ...] = ()) -> Folder:
    """What a run starts from: a model as `sources.open_model` takes it, or another run, whose policy at
    that step is then the base.

    within: the runs that are being opened on the way.
    """
    path = Path(model)
    if not is_run(path):
        return open_model(model)
    config, folder, checkpoints, number = open_run(path, step, within)
    with closing(checkpoints):
        trained = checkpoints.restore_trained(number)
    scale = 1.0 if config.lora is None else config.lora.scale
    changes = *folder.changes, Trained(folder.config, trained, scale)
    return replace(folder, changes=changes, named=path, step=number)


def open_references(config: Config) -> list[Folder]:
    """The models of the objective's further references, with their fingerprints. Raises InputError for what
    is no model that answers."""
    folders = [open_base(name) for name in config.objective.references]
    for name, folder in zip(config.objective.references, folders, strict=True):
        if folder.score is not None:
            raise refusal(f"objective.references, {name}", "is a reward model", "name models that answer")
        name_weights(folder)
    return folders


def base_again(model: str | Path, out: Path) -> Folder:
    """The base of a run in `out`: where it began from another run, of the step that it began from, however
    far that one has come since."""
    step: Any = "last"
    if is_run(Path(model)) and is_run(out):
        described = read_metadata(out)
        same = described["model"] == str(Path(model).resolve())
        step = described.get("model_step", step) if same else step
    return open_base(model, step)


def is_run(path: Path) -> bool:
    return os.path.isfile(path / "run.json")


def base_folder(model: str | Path) -> str | Path:
    """The model that a run, or the run that it began from, started from; what is no run as it is."""
    seen: list[Path] = []
    while is_run(Path(model)):
        _refuse_circle(Path(model), seen)
        seen.append(Path(model).resolve())
        model = read_metadata(seen[-1])["model"]
    return model


def _refuse_circle(run: Path, seen: Sequence[Path]) -> None:
    if run.resolve() in seen:
        raise InputError(f"{run} began from itself, as its run.json has it; put the original run.json back")


def open_run(
    out: str | Path, step: Which = "last", within: tuple[Path, ...] = ()
) -> tuple[Config, Folder, Checkpoints, int]:
    """(config, base folder, checkpoints, the step asked for). Only whole checkpoints count: of damaged ones
    stderr tells, and the next one is taken, unless a step was asked for by its number."""
    out = Path(out)
    _refuse_circle(out, within)
    config, described = read_config(out), read_metadata(out)
    began = str(described["model"]), described.get("model_step", "last"), (*within, out.resolve())
    folder = open_base(*began)
    name_weights(folder)
    if folder.fingerprint != described["model_fingerprint"]:
        raise InputError(
            f"{folder.named or folder.path} has changed since {out} was trained from it (fingerprint "
            f"{folder.fingerprint}, was {described['model_fingerprint']}); put the original back"
        )
    place = checkpoints_folder(out, config)
    checkpoints, number = Checkpoints(place), processes.on_first(lambda: _chosen(out, place, step))
    about = processes.on_first(lambda: checkpoints.about(number))
    check_checkpoint(place / str(number), about, config, described)
    return config, folder, checkpoints, number


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


def load_run(
    out: str | Path,
    dtype: Any = "auto",
    mesh: Any = None,
    step: Which = "last",
    base: Bundle | None = None,
) -> Bundle:
    """The model of a run's checkpoint (the newest, the best evaluated, or a step), ready to score. base: as
    of `load`."""
    config, folder, checkpoints, number = open_run(out, step)
    with closing(checkpoints):
        same = base is not None and base.folder.fingerprint == folder.fingerprint
        if base is not None and same and base.config.int8 == config.int8:
            bundle = base
        else:
            bundle = load(folder.kept(config.int8), dtype, mesh)
        trained = checkpoints.restore_trained(number, abstract_trained(config, bundle.config, bundle.mesh))
    return replace(bundle, trained=policy_alone(trained), lora=config.lora)


OTHERS.register("run")((is_run, load_run))


def initial(config: Config, bundle: Bundle, init_from: str | Path | None) -> Any:
    """What is trained at the start, where it is not as the base has it: a run's (`trained_of`), and what a
    value model starts from; else None."""
    value = config.online.value_model if isinstance(config.online, OnlineRewards) else None
    if init_from is None and value is None:
        return None
    trained = init_trained(bundle, config)
    if init_from is not None:
        trained |= trained_of(init_from, config, bundle)
    if value is not None:
        trained[VALUE] = trained_of(value, value_config(config), bundle)
    return trained


def trained_of(run: str | Path, config: Config, bundle: Bundle) -> Any:
    """What a run has trained, for another run of the same base to start from; its reference stays the base.

    Raises InputError for a run from another base, or one that trained other parameters.
    """
    theirs, folder, checkpoints, number = open_run(run)
    with closing(checkpoints):
        if folder.fingerprint != bundle.folder.fingerprint:
            base = folder.named or folder.path
            raise refusal(str(run), f"was trained from {base}, another model", "give --model that one")
        if theirs.lora != config.lora:
            raise refusal(str(run), f"has {theirs.lora or 'no LoRA'}", "give the same --lora options")
        like = policy_alone(abstract_trained(config, bundle.config, bundle.mesh))
        its = abstract_trained(theirs, bundle.config, bundle.mesh)
        beside = {VALUE: its.pop(VALUE)} if VALUE in its else {}
        differ = like.get("params", {}).keys() ^ its.get("params", {}).keys()
        differ |= {SCORE} & (like.keys() ^ its.keys())
        if differ:
            problem = f"{', '.join(sorted(differ))}: trained by one run alone"
            raise refusal(str(run), problem, "give the same --freeze and rates")
        return policy_alone(checkpoints.restore_trained(number, like | beside))


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    adapter: bool = False,
    dtype: str | None = None,
    step: Which = "last",
) -> dict[str, Any]:
    """Write a run's checkpoint as a Hugging Face folder, or as a PEFT adapter.

    run: its folder. out: the folder to make. dtype: of the written weights; default, as the base folder
    has them (adapter: float32). step: the newest checkpoint, the best evaluated one, or a step's number.
    What was trained over a base in int8 is merged into the folder's own weights; "trained_over" tells it.
    The run's own config.json says what was trained. Returns what was written: counts of tensors and, for
    a merge into 16 bits, what rounding cost.
    """
    with alone(out):
        return _export_run(run, Path(out), adapter, dtype, step)


def _export_run(
    run: str | Path, out: Path, adapter: bool, dtype: str | None, step: Which
) -> dict[str, Any]:
    config, folder, checkpoints, number = open_run(run, step)
    with closing(checkpoints):
        trained = checkpoints.restore_trained(number)
    lora = config.lora
    if adapter:
        if lora is None:
            raise InputError(
                f"{run} trained the parameters themselves: it has no adapter; export without --adapter"
            )
        report = export_adapter(folder, out, trained, lora.rank, lora.alpha, lora.targets, dtype)
    else:
        report = export_merged(folder, out, trained, 1.0 if lora is None else lora.scale, dtype)
    trained_over = {"trained_over": "int8"} if config.int8 else {}
    return {"step": number, **trained_over, **report}
