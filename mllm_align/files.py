"""File input and output: validated JSON, and outputs that are written atomically."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from mllm_align.errors import InputError, NotFinite, one_line, refusal

MAX_DEPTH = 100  # levels of JSON; code that recurses over values must stay below Python's limit of 1,000


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, with a one-line message, for text that is not JSON, not
    UTF-8 or nested deeper than MAX_DEPTH."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    opening = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    if sum(map(text.count, opening)) > MAX_DEPTH:  # type: ignore[arg-type]
        level = _containers([value])
        for _ in range(MAX_DEPTH):
            inside = (each.values() if isinstance(each, dict) else each for each in level)
            level = [value for values in inside for value in _containers(values)]
        if level:
            raise ValueError("it is nested too deeply")
    return value


def _containers(values: Any) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]


def read_json(file: str | Path, remedy: str, kind: type = dict) -> Any:
    """The JSON value of a file, of type `kind`. Raises InputError, with the remedy, if the file can't be
    read or contains something else."""
    wanted = {dict: "an object", list: "a list"}.get(kind, kind.__name__)
    try:
        value = parse_json(Path(file).read_bytes())
    except OSError as error:
        raise refusal(str(file), f"can't be read ({error.strerror or error})", remedy) from error
    except ValueError as error:
        raise refusal(str(file), f"is not JSON ({one_line(error, 200)})", remedy) from error
    if not isinstance(value, kind):
        raise refusal(str(file), f"holds {type(value).__name__} where {wanted} belongs", remedy)
    return value


def names_apart(paths: Sequence[str | Path]) -> list[str]:
    """A name for each path: its last part, and as many of those before as tell it from the others. Raises
    InputError where two are the same."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    doubled = [str(path) for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1]
    if doubled:
        raise InputError(f"{doubled[0]} is given twice; give each once")

    def name(own: tuple[str, ...]) -> str:
        for count in range(1, len(own)):
            if sum(each[-count:] == own[-count:] for each in parts) == 1:
                return "-".join(own[-count:])
        return "-".join(own[1:]) or "root"

    return [name(own) for own in parts]


def json_text(value: Any, indent: int | None = None) -> str:
    """The JSON text of a report; values without a JSON form, such as paths, are written as str.

    Raises NotFinite, with the location, for NaN and infinity, which JSON does not have. Values that are
    legitimately missing must be None.
    """
    try:
        return json.dumps(value, indent=indent, default=_plain, allow_nan=False)
    except ValueError as error:
        at = _where_not_finite(value) or "a number"
        raise NotFinite(f"{at} is not finite, so it can't be reported") from error


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)  # NumPy's numbers stay numbers


def _where_not_finite(value: Any, at: str = "") -> str | None:
    """The location of the first such number, such as `scores[3].chosen_logp`."""
    if isinstance(value, float):
        return None if math.isfinite(value) else at
    inside: Any = ()
    if isinstance(value, dict):
        inside = ((f"{at}.{name}".lstrip("."), each) for name, each in value.items())
    elif isinstance(value, list | tuple):
        inside = ((f"{at}[{number}]", each) for number, each in enumerate(value))
    return next((found for place, each in inside if (found := _where_not_finite(each, place))), None)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `out` when the block ends, and is removed if the block fails.

    `out` may exist if it is an empty folder; missing parents are made. Raises InputError if anything else
    exists there, and for every OSError until the folder has been renamed.
    """
    with _beside(Path(out)) as (place, partial):
        if place.is_dir() and any(place.iterdir()):
            raise refusal(str(out), "the folder is not empty", "name a new one, or remove it first")
        if place.exists() and not place.is_dir():
            raise refusal(str(out), "this is a file", "name a new folder")
        partial.mkdir()
        yield partial


@contextmanager
def new_file(out: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """An open file (text: UTF-8) that becomes `out` when the block ends and is removed if the block fails.

    An existing file at `out` is replaced only then; missing parents are made. Raises InputError if `out` is
    a folder or a device, and for every OSError until the file has been renamed.
    """
    with _beside(Path(out)) as (place, partial):
        if place.exists() and not place.is_file():
            what = "folder" if place.is_dir() else "device or pipe"
            raise refusal(str(out), f"this is a {what}", "name a file")
        with open(partial, mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file


def lines_beside(out: Path) -> Path:
    """result.json -> result.jsonl. Raises InputError where that is something else's."""
    if out.is_dir():
        raise refusal(str(out), "this is a folder", "name a file")
    beside = out.with_suffix(".jsonl")
    if beside == out:
        raise refusal(str(out), "is named as the lines beside it", "give --out a name that ends in .json")
    begun = out.exists() or out.with_name(out.name + ".part").exists()
    if beside.exists() and not begun:
        raise refusal(str(beside), "is there without its .json, so it is not ours", "give another --out")
    return beside


@contextmanager
def _beside(out: Path) -> Iterator[tuple[Path, Path]]:
    """The real path of `out` (links followed), and a hidden sibling that is renamed to it at the end."""
    place = Path(os.path.realpath(out))
    partial = place.parent / f".{place.name}.partial-{secrets.token_hex(4)}"
    made = [parent for parent in place.parents if not os.path.exists(parent)]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield place, partial
        os.replace(partial, place)
    except BaseException as error:  # an interrupt must leave nothing behind either
        _remove(partial)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            reason = _reason(error, place, partial)
            raise InputError(one_line(f"can't write {out}: {reason}", 500)) from error
        raise


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _reason(error: OSError, place: Path, partial: Path) -> str:
    """The system's message, with the file it is about if that is not `place`."""
    text = error.strerror or str(error)
    name = str(error.filename or "")
    is_place = not name or name == str(place) or name.startswith(str(partial))
    return text if is_place else f"{text} ({name})"
