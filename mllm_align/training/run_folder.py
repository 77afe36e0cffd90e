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

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mllm_align import processes
from mllm_align.config import Config, from_json, save_json, to_json
from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import json_text, new_file, parse_json, read_json
from mllm_align.locks import INSIDE
from mllm_align.training.checkpoint import kept
from mllm_align.training.optim import schedule

# What a start that failed may leave without a run: it was dear, and says itself what it belongs to.
LEFT = {"reference.npz", "reference_eval.npz", "features", "features_eval", "answers"}
LEFT |= {"reference_second.npz", "reference_eval_second.npz", "references", "references_eval"}
MOST_STEPS = 10**9  # counters are of 32 bits


class Length(NamedTuple):
    """steps: of the whole run. warmup: over how many of them the rate rises."""

    steps: int
    warmup: int


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
