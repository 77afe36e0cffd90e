"""A run folder: what was asked, on which model and data, and what came of it.

config.json    the resolved configuration
run.json       model folder and fingerprint, data, versions, device
log.jsonl      one line for every event: start, train, example, eval, save, done
checkpoints/   trained parameters and optimizer state
reference.npz  reference log-probs, if they were computed beforehand; those under a rejected image are in
               reference_second.npz
references/    those under further references of the objective, a file for each
features/      the vision tower's features, likewise
answers/       what an endpoint said of the policy's responses, if one is the annotator
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import MISSING, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from mllm_align import processes
from mllm_align.config import Config, OnlineRewards, from_json, part_files, save_json, to_json
from mllm_align.data.encode import Encoded
from mllm_align.data.mixture import Mixture
from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import json_text, new_file, parse_json, read_json
from mllm_align.locks import INSIDE, alone
from mllm_align.models.bundle import OTHERS, Bundle, load
from mllm_align.models.changes import Trained
from mllm_align.models.export import export_adapter, export_merged
from mllm_align.models.huggingface import Folder
from mllm_align.models.policy import SCORE, VALUE, policy_alone
from mllm_align.models.sources import open_model
from mllm_align.prepare import name_weights
from mllm_align.training.checkpoint import Checkpoints, Which, choose, kept
from mllm_align.training.optim import abstract_trained, init_trained, schedule, value_config

# What a start that failed may leave without a run: it was dear, and says itself what it belongs to.
LEFT = {"reference.npz", "reference_eval.npz", "features", "features_eval", "answers"}
LEFT |= {"reference_second.npz", "reference_eval_second.npz", "references", "references_eval"}
MOST_STEPS = 10**9  # counters are of 32 bits


class Length(NamedTuple):
    """steps: of the whole run. warmup: over how many of them the rate rises."""

    steps: int
    warmup: int


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


def open_references(config: Config) -> list[Folder]:
    """The models of the objective's further references, with their fingerprints. Raises InputError for what
    is no model that answers."""
    folders = [open_base(name) for name in config.objective.references]
    for name, folder in zip(config.objective.references, folders, strict=True):
        if folder.score is not None:
            raise refusal(f"objective.references, {name}", "is a reward model", "name models that answer")
        name_weights(folder)
    return folders


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


def check_folder(out: Path, config: Config) -> None:
    """Refuse a run folder that is something else, or a run of another configuration."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; --out names a folder")
    names = {path.name for path in out.iterdir()} - {INSIDE} if out.exists() else set()
    if "config.json" not in names:
        if names - LEFT:
            raise InputError(f"{out} holds other files; give --out a new folder, or one of an earlier run")
    elif has_begun(out, checkpoints_folder(out, config)):
        _check_config(out, read_config(out), config)


def has_begun(out: Path, place: epath.Path) -> bool:
    """Whether a run has come so far that it must be continued: a step is in its log, or saved."""
    try:
        with open(out / "log.jsonl", "rb") as file:
            if any(_event(line) not in (None, "start", "benchmark") for line in file):
                return True
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{out / 'log.jsonl'} can't be read ({one_line(error)}); mend it") from error
    return bool(kept(place))


def _event(line: bytes) -> Any:
    with suppress(ValueError):
        value = parse_json(line)
        return value.get("event") if isinstance(value, dict) else None
    return None


@contextmanager
def undone_unless_begun(out: Path, place: epath.Path) -> Iterator[None]:
    """Take away what the block put into the run folder, if it fails before a step was taken: a mended
    command shall find nothing of another run there."""
    there = {path.name for path in out.iterdir()} if out.exists() else None
    place_there = place.exists()
    try:
        yield
    except BaseException:
        if processes.first():
            with suppress(OSError, InputError):
                if not has_begun(out, place):
                    _undo(out, there, place, place_there)
        raise


def _undo(out: Path, there: set[str] | None, place: epath.Path, place_there: bool) -> None:
    if not place_there and place.exists():
        place.rmtree()
    stay = LEFT | (there or set()) - {"config.json", "run.json", "log.jsonl"}
    for path in out.iterdir():
        if path.name not in stay:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if there is None:
        with suppress(OSError):  # what may be left stays
            out.rmdir()


def _check_config(out: Any, saved: Config, now: Config) -> None:
    old, new = (_flat(to_json(_settled(c))) for c in (saved, now))
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differ:
        raise InputError(
            f"{out} was started with another configuration ({', '.join(sorted(differ))} differ); "
            "take those back, or give --out a new folder"
        )


def _settled(config: Any) -> Any:
    """The config with all that may change at a restart set to its default, in its parts too."""
    values = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name in config.may_change:
            value = each.default if each.default_factory is MISSING else each.default_factory()
        elif hasattr(value, "may_change"):
            value = _settled(value)
        values[each.name] = value
    return replace(config, **values)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return out


NO_RUN = "give a run folder that is whole, or --out a new one"


def read_config(out: Path) -> Config:
    return from_json(read_json(out / "config.json", f"{out} is no run folder: {NO_RUN}"))


def read_metadata(out: Path) -> dict[str, Any]:
    """What run.json says. Raises InputError where it does not say what a run needs."""
    metadata = read_json(out / "run.json", f"{out} is no run folder: {NO_RUN}")
    for name in ("model", "model_fingerprint"):
        if not isinstance(metadata.get(name), str):
            raise refusal(str(out / "run.json"), f"{name} is {one_line(metadata.get(name))}", NO_RUN)
    step = metadata.get("model_step", 1)  # of the run that this one began from
    if not isinstance(step, int) or step < 1:
        raise refusal(str(out / "run.json"), f"model_step is {one_line(step)}", NO_RUN)
    _part_files(out / "run.json", metadata)
    return metadata


def _part_files(at: Any, metadata: dict[str, Any]) -> dict[str, str]:
    """Digests of the user's files that a run stands on; runs of earlier versions name none."""
    files = metadata.get("part_files", {})
    if not isinstance(files, dict):
        raise refusal(str(at), f"part_files is {one_line(files)}", NO_RUN)
    return files


def check(out: Path, config: Config, described: dict[str, Any]) -> None:
    """Refuse to continue a run of another model or other data."""
    if (out / "run.json").exists() and has_begun(out, checkpoints_folder(out, config)):
        _check_same(out, read_metadata(out), described)


def _check_same(out: Any, saved: dict[str, Any], described: dict[str, Any]) -> None:
    files = _part_files(out, saved)
    for file, digest in _part_files(out, described).items():
        if files.get(file, digest) != digest:
            raise InputError(
                f"{file} has changed since {out} was started; take its earlier version, or give --out a "
                "new folder"
            )
    for what, name in (
        ("from another model", "model"),
        ("from another projector", "projector"),
        ("on other data", "data"),
        ("with another judge", "judge"),
        ("with other references", "references"),
    ):
        found, now = (d.get(f"{name}_fingerprint") for d in (saved, described))
        if found != now:
            first = f"{saved.get(name, name)}, fingerprint {found}"
            raise InputError(
                f"{out} was started {what} ({first}; this one is {now}); give its {name}, or --out a new "
                "folder"
            )
    before, now = (d.get("data_weights") for d in (saved, described))
    if before != now:
        given = "the weights " + ", ".join(f"{name} {w:g}" for name, w in (before or {}).items())
        given = given if before else "one data set and no weights"
        raise InputError(f"{out} was started with {given}; give --data so, or --out a new folder")
    before, now = (d.get("init_from") for d in (saved, described))
    if before != now:
        given = f"--init-from {before}" if before else "no --init-from"
        raise InputError(f"{out} was started with {given}; give that, or --out a new folder")


def check_checkpoint(place: Any, about: dict[str, Any], config: Config, described: dict[str, Any]) -> None:
    """The same of what a checkpoint says of itself: it may have come from elsewhere."""
    _check_config(place, _config_of(place, about), config)
    _check_same(place, about, described)


def _config_of(place: Any, about: dict[str, Any]) -> Config:
    if not isinstance(about.get("config"), dict):
        raise InputError(f"{place} does not say what it is of; remove it to go back to the one before")
    return from_json(about["config"])


# ---- how long --------------------------------------------------------------------------------------------


def length(config: Config, records: int) -> Length:
    """Of a run that begins. Raises InputError for more steps than can be counted."""
    per_epoch = -(-records // config.batch_size)
    steps = config.steps or config.rounds.lasting(math.ceil(config.epochs * per_epoch))
    if steps > MOST_STEPS:
        problem = f"epochs is {config.epochs:g}, which makes {steps} steps of {per_epoch} in each epoch"
        raise InputError(f"{problem}; give fewer: at most {MOST_STEPS} steps")
    return Length(steps, round(config.optim.warmup * steps))


def goes_on(
    out: Path, about: dict[str, Any], config: Config, records: int, step: int, allowed: bool
) -> tuple[Length, Length]:
    """How long a run was to be that has taken `step` steps, and how long it is to be now.

    Its warm-up stays as it was. Raises InputError for fewer steps than are taken, and for another length
    that changes the rates of the schedule, unless that is allowed.
    """
    begun = (out / "run.json").exists()
    saved = read_config(out) if begun else _config_of(out, about)
    before, now = (
        _recorded(out, read_metadata(out) if begun else about, saved, records),
        length(config, records),
    )
    if now.steps == before.steps:
        return before, before
    now = Length(now.steps, before.warmup)
    if now.steps < step:
        raise InputError(
            f"{out} has taken {step} steps, {now.steps} are asked for; give --steps {step} or more"
        )
    rates = [
        schedule(config.optim, config.optim.learning_rate, it.steps, it.warmup) for it in (before, now)
    ]
    if config.optim.schedule != "constant" and not allowed:
        old, new = (f"{float(rate(step)):.3g}" for rate in rates)  # type: ignore[arg-type]
        rate = f"the learning rate of step {step + 1} would be {new}, not {old}"
        raise InputError(
            f"{out} was started for {before.steps} steps; with {now.steps} its {config.optim.schedule} "
            f"schedule changes: {rate}; give --allow-schedule-change, or the number of before"
        )
    return before, now


def _recorded(out: Path, about: dict[str, Any], saved: Config, records: int) -> Length:
    """How long a run was to be, by what it says of itself."""
    steps, warmup = (about.get(name) for name in ("steps", "warmup_steps"))
    if steps is None and warmup is None:  # of an earlier version
        return length(saved, records)
    if type(steps) is not int or type(warmup) is not int or not 0 <= warmup <= steps <= MOST_STEPS:
        problem = f"its steps and warmup_steps are {one_line(steps)} and {one_line(warmup)}"
        raise refusal(str(out), problem, NO_RUN)
    return Length(steps, warmup)


def checkpoints_folder(out: Path, config: Config) -> epath.Path:
    if config.checkpoints is None:
        return epath.Path(out.resolve()) / "checkpoints"
    place = epath.Path(config.checkpoints)
    return place if "://" in config.checkpoints else place.resolve()


def start(out: Path, config: Config, described: dict[str, Any], step: int) -> None:
    """Make the run folder, unless it is that of the run that goes on from `step`."""
    if step and (out / "run.json").exists():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"can't make the run folder {out}: {one_line(error)}; give another --out"
        ) from error
    _write(out, config, described)


def lengthen(out: Path, config: Config, now: Length) -> None:
    """Put down that a run is to be longer, or shorter."""
    saved = replace(read_config(out), steps=config.steps, epochs=config.epochs)
    _write(out, saved, read_metadata(out) | lengths(now))


def note(out: Path, **facts: Any) -> None:
    """Put down in run.json what was found after the run folder was made."""
    described = read_metadata(out)
    if described | facts != described:
        _write(out, read_config(out), described | facts)


def lengths(length: Length) -> dict[str, int]:
    """As run.json and checkpoints have it."""
    return {"steps": length.steps, "warmup_steps": length.warmup}


def _write(out: Path, config: Config, described: dict[str, Any]) -> None:
    with new_file(out / "config.json") as file:
        file.write(save_json(config))
    with new_file(out / "run.json") as file:
        file.write(json_text(described, indent=2) + "\n")


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
