"""Rows of one data file: JSON lines or a JSON list, optionally gzipped, Parquet, Arrow, ArrayRecord."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mllm_align.data.array_records import ArrayRecords
from mllm_align.data.records import check_object
from mllm_align.data.roots import Roots
from mllm_align.data.tables import ArrowTable, ParquetTable
from mllm_align.errors import InputError, one_line, quoted, refusal
from mllm_align.files import parse_json

_SHARD = re.compile(r"(\.array_record)-\d+(-of-\d+)?$")


@dataclass(frozen=True)
class DataFile:
    """A file to read. `name`: for error messages. `roots`: folders that its image paths are relative to."""

    path: Path
    name: str
    roots: Roots


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read. `index`: its number in the file named by `where`."""

    value: Any
    where: str
    index: int
    roots: Roots

    @property
    def at(self) -> str:
        return f"{self.where} {self.index}"


def suffix_of(name: str) -> str:
    """Return the known suffix of a data file's name in lower case, such as `.jsonl.gz`; '' if none. That of
    ArrayRecord files stands before their number."""
    name = _SHARD.sub(r"\1", name.lower())
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def read_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of a file. Raises `InputError`, in one line, if it cannot be read."""
    suffix, name = suffix_of(file.path.name), file.name
    if not suffix:
        problem = f"the suffix {quoted(file.path.suffix)} is unknown"
        raise refusal(name, problem, f"give one of {', '.join(SUFFIXES)}")
    where = f"{name} record"
    try:
        for index, value in enumerate(_READERS[suffix](file.path, name)):
            yield Row(value, where, index, file.roots)
    except InputError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"is damaged or cut short (gzip: {one_line(error)})"
        raise refusal(name, problem, "check that it is complete, or compress it again") from error
    except Exception as error:  # damaged tables make pyarrow raise errors of several types
        problem = f"cannot be read ({type(error).__name__}: {one_line(error)})"
        raise refusal(name, problem, "check that it is complete and readable") from error


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
        found = f"holds {type(values).__name__} instead of a list of objects"
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
        remedy = "correct it (.jsonl: one object per line; .json: one list)"
        raise refusal(at, f"is not JSON ({error.msg})", remedy) from error
    except ValueError as error:
        problem = f"cannot be read ({one_line(error)})"
        raise refusal(f"{name} line {line}", problem, "correct the value") from error


def _parquet(path: Path, name: str) -> Iterator[Any]:
    return ParquetTable(path).rows()


def _arrow(path: Path, name: str) -> Iterator[Any]:
    return ArrowTable(path).rows()


def _array_record(path: Path, name: str) -> Iterator[Any]:
    return ArrayRecords(path).rows()


_READERS: dict[str, Callable[[Path, str], Iterable[Any]]] = {
    ".jsonl": _jsonl,
    ".json": _json_list,
    ".jsonl.gz": _jsonl,
    ".json.gz": _json_list,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".array_record": _array_record,
}
SUFFIXES = tuple(_READERS)
