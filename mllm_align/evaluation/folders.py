"""A benchmark's folder as its makers publish it: files of questions and labels, and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_align.config import DataConfig
from mllm_align.data.images import ImageSource
from mllm_align.data.records import Message, Part, Record
from mllm_align.errors import InputError, first_few, one_line, quoted, refusal
from mllm_align.evaluation.base import Evaluator, Item
from mllm_align.files import parse_json, read_json

GUIDE = "docs/evaluation.md says where it is had"
SHORT = "{question}\nAnswer the question using a single word or phrase."
"""LLaVA's prompt for short answers."""


def folder_of(data: Any) -> Path:
    """The folder that `data` names. Raises InputError if it names none."""
    folder = Path(data) if isinstance(data, str | Path) else None
    if folder is None or not folder.is_dir():
        what = quoted(data) if isinstance(data, str | Path) else f"a {type(data).__name__}"
        raise InputError(f"data is {what}; give the benchmark's folder (docs/evaluation.md) with --data")
    return folder


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
    """Base class of benchmarks that put each question in a prompt."""

    prompt: str = SHORT
    """What is put to the model; {question} stands for the question."""

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise InputError(f"evaluator.prompt is {quoted(self.prompt)}; it must hold {{question}}")
