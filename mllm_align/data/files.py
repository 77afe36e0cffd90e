"""One data file to its rows: JSON lines, a JSON list, either of them gzipped, Parquet, Arrow."""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mllm_align.data.records import check_object
from mllm_align.data.roots import Roots
from mllm_align.data.tables import ArrowTable, ParquetTable
from mllm_align.errors import InputError, one_line, quoted, refusal
from mllm_align.files import parse_json


@dataclass(frozen=True)
class DataFile:
    """A file to read: `name` stands in error messages, `roots` are where its image paths start from."""

    path: Path
    name: str
    roots: Roots


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: `index` counts in the file that `where` names."""

    value: Any
    where: str
    index: int
    roots: Roots

    @property
    def at(self) -> str:
        return f"{self.where} {self.index}"


def suffix_of(name: str) -> str:
    """Return the suffix of a data file's name in lower case, `.gz` with the one before it; else ''."""
    name = name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of a file. Every way in which it cannot be read raises `InputError`, in one line."""
    suffix, name = suffix_of(file.path.name), file.name
    if not suffix:
        problem = f"the suffix {quoted(file.path.suffix)} is not known"
        raise refusal(name, problem, f"give one of {', '.join(SUFFIXES)}")
    where = f"{name} record"
    try:
        for index, value in enumerate(_READERS[suffix](file.path, name)):
            yield Row(value, where, index, file.roots)
    except InputError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"is damaged or cut short, as gzip tells ({one_line(error)})"
        raise refusal(name, problem, "check that it is whole, or compress it anew") from error
    except Exception as error:  # damaged tables make pyarrow raise errors of several types
        problem = f"cannot be read ({type(error).__name__}: {one_line(error)})"
        raise refusal(name, problem, "check that it is whole and readable") from error


def _jsonl(path: Path, name: str) -> Iterator[Any]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
            if line.strip():
                value = _json(line, name, number)
                check_object(value, f"{name} line {number}")
                yield value


def _json_list(path: Path, name: str) -> Iterator[Any]:
    with _opened(path) as file:
        data = file.read().removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        return
    values = _json(data, name, 1)
    if not isinstance(values, list):
        found = f"holds {type(values).__name__} instead of one list of objects"
        raise refusal(name, found, "make it a list, or .jsonl with one object per line")
    yield from values


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _json(data: bytes, name: str, line: int) -> Any:
    """Return the value of JSON that begins at `line` of the file."""
    try:
        return parse_json(data.decode())
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        problem = f"is not UTF-8 ({error.reason})"
        raise refusal(f"{name} line {line}", problem, "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        at = f"{name} line {line + error.lineno - 1}, column {error.colno}"
        remedy = "mend it (.jsonl holds one object per line, .json one list)"
        raise refusal(at, f"is not JSON ({error.msg})", remedy) from error
    except ValueError as error:
        problem = f"cannot be read ({one_line(error)})"
        raise refusal(f"{name} line {line}", problem, "mend the value") from error


def _parquet(path: Path, name: str) -> Iterator[Any]:
    return ParquetTable(path).rows()


def _arrow(path: Path, name: str) -> Iterator[Any]:
    return ArrowTable(path).rows()


_READERS: dict[str, Callable[[Path, str], Iterable[Any]]] = {
    ".jsonl": _jsonl,
    ".json": _json_list,
    ".jsonl.gz": _jsonl,
    ".json.gz": _json_list,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
SUFFIXES = tuple(_READERS)
