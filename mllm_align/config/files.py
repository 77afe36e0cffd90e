"""Configs from Python and YAML files and by name; to JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mllm_align.align.contract import OBJECTIVES
from mllm_align.align.weighted import says_sum, weighted
from mllm_align.config.annotators import ANNOTATORS
from mllm_align.config.documents import read_yaml, write_yaml
from mllm_align.config.online import ONLINE
from mllm_align.config.train import Config
from mllm_align.errors import InputError, nearest, one_line, quoted
from mllm_align.registry import load_part, part_file, part_name, registered_name, run_file

C = TypeVar("C")
REGISTRIES = (OBJECTIVES, ONLINE, ANNOTATORS)
"""Of the parts of a config that have kinds."""


def named_configs() -> dict[str, Path]:
    """The configs that come with the program: name -> file."""
    package = Path(__file__).parents[1]
    folder = package / "configs"  # of a wheel
    if not folder.is_dir():  # of a checkout
        folder = package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def load_config(name: str | Path, kind: type[C] | tuple[type[C], ...] = Config) -> C:
    """The config, of a `kind`, of a Python file with `get_config()`, a YAML or JSON file, or a name among
    `named_configs`. Raises InputError for an unusable file."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    path = _file(name)
    config = _from_python(path) if path.suffix == ".py" else _from_yaml(path, kinds)
    if not isinstance(config, kinds):
        wanted = " or ".join(each.__name__ for each in kinds)
        found = f"get_config() gives {type(config).__name__}, not a {wanted}"
        takes = "train takes a Config, bdhs a BDHSConfig, judge a JudgeConfig"
        raise InputError(f"{path}: {found}; {takes}")
    return config


def _file(name: str | Path) -> Path:
    path = Path(name)
    if path.parent == Path() and not path.suffix:
        known = named_configs()
        if str(name) not in known:
            places = "mllm-align configs lists them, and a file's name ends in .py or .yaml"
            raise InputError(f"no config is named {quoted(name)}{nearest(str(name), known)}; {places}")
        return known[str(name)]
    if path.suffix not in (".py", ".yaml", ".yml", ".json"):
        raise InputError(f"config file {path} is not Python or YAML; it must end in .py, .yaml or .json")
    if not path.is_file():
        raise InputError(f"config file {path} is not there")
    return path


def _from_python(path: Path) -> Any:
    try:
        return run_file(path).get_config()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is the user's program: anything may come out of it
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"config file {path} fails: {said}") from error


def _from_yaml(path: Path, kinds: tuple[type, ...], within: tuple[Path, ...] = ()) -> Any:
    """Fields over those of `base`, or over the defaults of the kind that has most of them."""
    values, lines = read_yaml(path)
    base = values.pop("base", None)
    try:
        if base is None:
            start = max(kinds, key=lambda kind: len(values.keys() & _fields(kind)))()
        else:
            start = _base(path, base, kinds, (*within, path.resolve()))
        return _built(type(start), _laid_over(to_json(start), _expanded(values)))
    except (ValueError, TypeError) as error:
        name = str(error).split(" ")[0].rstrip(":")
        at = f"{path} line {lines[name]}" if name in lines else str(path)
        raise InputError(f"{at}: {one_line(error, 500)}") from error


def _base(path: Path, name: Any, kinds: tuple[type, ...], within: tuple[Path, ...]) -> Any:
    """The config that a file starts from: a name, or a file beside it."""
    if not isinstance(name, str):
        raise ValueError("base is the name of a config or a file")
    file = _file(path.parent / name if Path(name).suffix else name)
    if file.resolve() in within:
        raise ValueError(f"base leads back to {file}")
    return _from_python(file) if file.suffix == ".py" else _from_yaml(file, kinds, within)


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """`objective: ipo` is short for `objective: {kind: ipo}`; so are `online` and `annotator`. And
    `objective: dpo:0.8 sft:0.1` is a sum."""

    def expand(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _expanded(value)
        if isinstance(value, list):
            return [_expanded(each) if isinstance(each, dict) else each for each in value]
        if name == "objective" and isinstance(value, str) and says_sum(value.split()):
            return to_json(weighted(value.split()))
        if name in ("objective", "online", "annotator") and isinstance(value, str):
            return None if value == "none" else {"kind": value}
        return value

    return {name: expand(name, value) for name, value in values.items()}


def _laid_over(below: Any, above: Any) -> Any:
    """The fields of a branch over those of another of the same kind; all else replaces what was there."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if above.get("kind", below.get("kind")) != below.get("kind"):
        return above
    return below | {name: _laid_over(below.get(name), value) for name, value in above.items()}


def _fields(kind: type) -> set[str]:
    return {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; a field of several kinds carries its kind, a user's as FILE:CLASS."""
    online = {cls: kind for kind, cls in ONLINE.items()}

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            cls: type = type(value)  # type: ignore[assignment]
            kind = registered_name(cls) or online.get(cls) or part_name(cls)
            own = not cls.__module__.startswith("mllm_align.")
            if own and (kind is None or "." in cls.__qualname__):
                problem = f"{cls.__qualname__} is not defined at the top of a Python file"
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


def _built(kind: Any, value: Any, at: str = "") -> Any:
    """A value of a field's type from its plain values. Raises ValueError, which begins with the field's
    dotted name, for what has no place in a config, and what the config itself raises."""
    if value is None:
        return None
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, dict) and "kind" in value:
        name = str(value["kind"])
        kind = load_part(name, "part of a config") if ":" in name else _kind(name, kinds)
        if kind is None:
            known = [each for registry in REGISTRIES for each in registry]
            raise ValueError(f"{at}.kind is {quoted(name)}{nearest(name, known)}")
        if not isinstance(kind, type) or not issubclass(kind, kinds):
            raise ValueError(f"{at}.kind is {quoted(name)}, which has no place there")
        return _built(kind, {name: each for name, each in value.items() if name != "kind"}, at)
    kind = next(k for k in kinds if k is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            wanted = f"it must have the fields of {getattr(kind, '__name__', kind)}"
            raise ValueError(f"{at or 'config'} is {quoted(value)}; {wanted}")
        value = getattr(kind, "of_earlier", dict)(value)
        hints, known = get_type_hints(kind), _fields(kind)  # type: ignore[arg-type]
        inside = f"{at}." if at else ""
        for name in value.keys() - known:
            raise ValueError(f"{inside}{name}: no such field{nearest(name, known)}")
        return kind(**{name: _built(hints[name], each, inside + name) for name, each in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list) else [value]  # what was one is several now
        return tuple(_built(get_args(kind)[0], each, at) for each in values)
    return Path(str(value)) if kind is Path else value


def _kind(name: str, wanted: tuple[type, ...]) -> type | None:
    """What a name stands for: `reward` is an objective or an annotator, by what the field takes."""
    named = [registry[name] for registry in REGISTRIES if name in registry]
    return next((kind for kind in named if issubclass(kind, wanted)), named[0] if named else None)


def save_json(config: Any) -> str:
    """The text of a config file, as a run folder holds it."""
    return json.dumps(to_json(config), indent=2) + "\n"


def save_yaml(config: Any) -> str:
    """The same in YAML."""
    return write_yaml(to_json(config))


def part_files(config: Any) -> dict[str, str]:
    """The files that a user's own parts of a config come from, with the digest of each."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(each):
                found |= part_files(each)
    parts = [] if part_name(type(config)) is None else [type(config)]
    parts += [load_part(name, what) for what, name in getattr(config, "own_functions", {}).items()]
    for file in map(part_file, parts):
        if file is not None:
            found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found
