"""Configs from Python files, to JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mllm_align.align.objectives import OBJECTIVES
from mllm_align.config.annotators import ANNOTATORS
from mllm_align.config.online import ONLINE
from mllm_align.config.train import Config
from mllm_align.errors import InputError, one_line
from mllm_align.registry import load_part, part_file, part_name, run_file

# Kinds of a field: their names in JSON and on the command line.
KINDS: dict[str, type] = {**OBJECTIVES, **ONLINE, **ANNOTATORS}

C = TypeVar("C")


def load_config(path: str | Path, kind: type[C] | tuple[type[C], ...] = Config) -> C:
    """Run a config file; its `get_config()`, of a `kind`. Raises InputError for an unusable file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config file {path} is not there")
    if path.suffix != ".py":
        raise InputError(f"config file {path} is not Python; it must end in .py")
    try:
        config = run_file(path).get_config()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is the user's program: anything may come out of it
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"config file {path} fails: {said}") from error
    if not isinstance(config, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = f"get_config() gives {type(config).__name__}, not a {wanted}"
        takes = "train takes a Config, bdhs a BDHSConfig, judge a JudgeConfig"
        raise InputError(f"{path}: {found}; {takes}")
    return config


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; a field of several kinds carries its kind, a user's as FILE:CLASS."""
    kinds = {cls: kind for kind, cls in KINDS.items()}

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            kind = kinds.get(type(value)) or part_name(type(value))  # type: ignore[arg-type]
            own = not type(value).__module__.startswith("mllm_align.")
            if own and (kind is None or "." in type(value).__qualname__):
                problem = f"{type(value).__qualname__} is not defined at the top of a Python file"
                raise InputError(f"{problem}; put it there, where a saved run finds it again")
            return fields if kind is None else {"kind": kind, **fields}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def from_json(values: dict[str, Any], kind: type[C] = Config) -> C:
    """The inverse of `to_json`, for configs saved with a run."""
    try:
        return _built(kind, values)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the saved config is not of this version: {one_line(error)}") from error


def _built(kind: Any, value: Any) -> Any:
    """A value of a field's type from its JSON."""
    if value is None:
        return None
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, dict) and "kind" in value:
        name = value["kind"]
        kind = load_part(name, "part of a config") if ":" in name else KINDS[name]
        if not issubclass(kind, kinds):
            raise ValueError(f"{name!r} has no place there")
        return _built(kind, {name: each for name, each in value.items() if name != "kind"})
    kind = next(k for k in kinds if k is not type(None))
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _built(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) else value  # what was one is several now
        return tuple(_built(get_args(kind)[0], each) for each in values)
    return Path(str(value)) if kind is Path else value


def save_json(config: Any) -> str:
    return json.dumps(to_json(config), indent=2) + "\n"


def part_files(config: Any) -> dict[str, str]:
    """The files that a user's own parts of a config come from, with the digest of each."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= part_files(value)
    file = part_file(type(config))
    if part_name(type(config)) is not None and file is not None:
        found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found
