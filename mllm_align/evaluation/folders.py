"""A benchmark's folder as its makers publish it: files of questions and labels, and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mllm_align.config import DataConfig
from mllm_align.data.images import ImageSource
from mllm_align.data.records import Message, Part, Record
from mllm_align.errors import InputError, first_few, one_line, quoted, refusal
from mllm_align.evaluation.base import Evaluator, Item
from mllm_align.files import parse_json, read_json
from mllm_align.registry import registered_name

GUIDE = "docs/evaluation.md says where it is had"
SHORT = "{question}\nAnswer the question using a single word or phrase."
"""LLaVA's prompt for short answers."""
LLAVA, LMMS_EVAL = "llava", "lmms-eval"


def folder_of(data: Any) -> Path:
    """The folder that `data` names. Raises InputError if it names none."""
    folder = Path(data) if isinstance(data, str | Path) else None
    if folder is None or not folder.is_dir():
        what = quoted(data) if isinstance(data, str | Path) else f"a {type(data).__name__}"
        raise InputError(f"data is {what}; give the benchmark's folder (docs/evaluation.md) with --data")
    return folder


def place_among(folder: Path, name: str, kind: type[Evaluator]) -> Path | None:
    """Where a benchmark's data lie among those of others: named like it, or as its class says; _ stands for
    -, too."""
    there = {each.name.replace("_", "-"): each for each in sorted(folder.iterdir())}
    return there.get(name) or there.get(kind.folder or name)


def find(folder: Path, *names: str) -> Path:
    """The first of these files that is there. Raises InputError, which says what is missing and where it
    belongs."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise refusal(str(folder), f"{' or '.join(names)} is missing", f"put it there: {GUIDE}")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises InputError for anything else."""
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problem = f"is not JSON ({one_line(error, 200)})"
            raise refusal(f"{file} line {number}", problem, "get the file again") from error
        if not isinstance(row, dict):
            raise refusal(f"{file} line {number}", "is no object", "get the file again")
        rows.append(row)
    return rows


def read_value(file: Path, kind: type) -> Any:
    """The JSON value of a file."""
    return read_json(file, "get the file again", kind)


def field(row: Any, name: str, kind: Any, where: str) -> Any:
    """A field of a row. Raises InputError where it is missing or of another type."""
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise refusal(f"{where}, {name}", found, "get the file again")
    return value


def unique(ids: Iterable[Any], file: Path) -> None:
    """Raises InputError for doubled ids, which it counts and names."""
    doubled = [str(each) for each, count in Counter(ids).items() if count > 1]
    if doubled:
        problem = f"{len(doubled)} ids come several times: {first_few(doubled)}"
        raise refusal(str(file), problem, "keep one row of each")


def pictures(folder: Path, config: DataConfig, *places: str) -> Callable[[str], Path]:
    """Where a picture is: in --data.image-root, or else in one of these places in the folder. Raises
    InputError for a part of a data set: a benchmark's figures are of all its questions."""
    if config.max_records is not None:
        raise InputError("a benchmark is asked as a whole; leave out --data.max-records")
    roots: Sequence[Path] = config.image_root or [folder / place for place in (*places, "")]

    def find(name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise refusal(str(folder), f"the picture {quoted(name)} leaves the folder", "correct its name")
        return next((root / name for root in roots if (root / name).is_file()), roots[0] / name)

    return find


def ask(id: str, picture: Path, prompt: str, question: str, where: str, **labels: Any) -> Item:
    """A question about a picture. prompt: the text that is put to the model, where {question} stands for
    the question."""
    text = Part(prompt.replace("{question}", question))
    image = ImageSource(path=picture, where=where)
    record = Record(id, (Message("user", (Part(), text)),), (), (image,), where)
    return Item(record, {"question": question, **labels} if question else labels)


@dataclass(frozen=True)
class Prompted(Evaluator):
    """Base class of benchmarks that put each question in a prompt.

    presets: what others than LLaVA have in place of the defaults, preset -> field -> value. A field, or one
    of `sampling`, that was given another value than its default keeps it.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    prompt: str = SHORT
    """What is put to the model; {question} stands for the question."""
    preset: str = LLAVA
    """Whose prompt, generation settings and reading of answers: llava, or lmms-eval where that differs."""

    def __post_init__(self) -> None:
        known = (LLAVA, *self.presets)
        if self.preset not in known:
            name = registered_name(type(self)) or type(self).__name__
            has = f"{name} has {' and '.join(known)}"
            raise InputError(f"evaluator.preset is {quoted(self.preset)}; {has}")
        wanted = self.presets.get(self.preset, {})
        for each in fields(self):
            if each.name in wanted:
                value = _laid_under(getattr(self, each.name), each.default, wanted[each.name])
                object.__setattr__(self, each.name, value)
        if "{question}" not in self.prompt:
            raise InputError(f"evaluator.prompt is {quoted(self.prompt)}; it must hold {{question}}")


def _laid_under(value: Any, default: Any, wanted: Any) -> Any:
    """`wanted` where `value` is the default; of a config, field by field."""
    if is_dataclass(value) and not isinstance(value, type) and type(value) is type(default):
        of = [
            (each.name, *(getattr(one, each.name) for one in (value, default, wanted)))
            for each in fields(value)
        ]
        return replace(value, **{name: _laid_under(*each) for name, *each in of})
    return wanted if value == default else value
