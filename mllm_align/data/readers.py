"""Records from files (JSONL, JSON, Parquet) and from rows in memory, in three public formats."""

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_align.data.records import Record, check_object, check_text, parse_record, record_id
from mllm_align.errors import InputError, one_line, quoted, refusal

_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class _Row:
    """One row as read: `index` counts in the file that `where` names."""

    value: Any
    where: str
    index: int

    @property
    def at(self) -> str:
        return f"{self.where} {self.index}"


def read_records(
    path: str | os.PathLike,
    *,
    format: str = "auto",
    image_root: str | os.PathLike | None = None,
    allow_outside: bool = False,
    responses: int = 2,
) -> list[Record]:
    """Return the records of a .jsonl, .json or .parquet file or of a folder of .parquet files.

    `format`: trl, povid, rlhfv, or auto, which goes by the first row's columns. `image_root`: the
    folder that image paths start from (default: the data's own), left only with `allow_outside`.
    `responses`: how many a record needs at least. Raises `InputError` for a file that is missing,
    empty, unreadable or not what its suffix says, for any faulty record and for repeated ids.
    """
    path = Path(path)
    folder = path if os.path.isdir(path) else path.parent
    root = folder if image_root is None else _folder(image_root)
    return _records(_read(path), one_line(path.name), format, root, allow_outside, responses)


def records_from(
    data: str | os.PathLike | Iterable[Mapping[str, Any] | Record],
    *,
    format: str = "auto",
    image_root: str | os.PathLike | None = None,
    allow_outside: bool = False,
    responses: int = 2,
) -> list[Record]:
    """Return the records of a file (see `read_records`) or of rows in memory.

    Rows may hold decoded images, and `Record`s pass as they are. Without `image_root` their image
    paths are relative to the current folder and may lead anywhere. Raises `InputError` as
    `read_records` does.
    """
    if isinstance(data, str | os.PathLike):
        return read_records(
            data,
            format=format,
            image_root=image_root,
            allow_outside=allow_outside,
            responses=responses,
        )
    if isinstance(data, Mapping | bytes) or not isinstance(data, Iterable):
        raise refusal("data", f"found {type(data).__name__}", "give a path or a list of records")
    root = None if image_root is None else _folder(image_root)
    rows = (_Row(value, "record", index) for index, value in enumerate(data))
    return _records(rows, "data", format, root, allow_outside, responses)


def _folder(path: str | os.PathLike) -> Path:
    if not os.path.isdir(path):
        raise refusal("image_root", f"{quoted(path)} is not a folder", "give the images' folder")
    return Path(path).resolve()


# --- rows to records ----------------------------------------------------------------------------


def _records(
    rows: Iterable[_Row],
    name: str,
    format: str,
    root: Path | None,
    allow_outside: bool,
    responses: int,
) -> list[Record]:
    if format != "auto" and format not in _FORMATS:
        found = f"found {quoted(format)}"
        raise refusal("format", found, f"give one of auto, {', '.join(_FORMATS)}")
    records: list[Record] = []
    ours: dict[int, int] = {}  # records whose ids we may change -> the number of their row
    for number, row in enumerate(rows):
        if isinstance(row.value, Record):
            records.append(row.value)
            continue
        check_object(row.value, row.at)
        if format == "auto":
            format = _format_of(row.value)
        for plain in _FORMATS[format](row, number):
            if plain.pop("id_is_ours", False):
                ours[len(records)] = number
            records.append(
                parse_record(
                    plain,
                    index=row.index,
                    where=row.where,
                    root=root,
                    allow_outside=allow_outside,
                    responses=responses,
                )
            )
    if not records:
        raise refusal(name, "holds no records", "give at least one")
    return _with_unique_ids(records, ours)


def _with_unique_ids(records: list[Record], ours: dict[int, int]) -> list[Record]:
    """Refuse repeated ids that were given; make those of our own give way."""
    seen: dict[str, str] = {}
    for i, record in enumerate(records):
        if i not in ours:
            other = seen.get(record.id)
            if other is not None:
                problem = f"the id {quoted(record.id)} is already that of {other}"
                raise refusal(f"{record.where}, id", problem, "give every record its own")
            seen[record.id] = record.where
    for i, number in ours.items():
        while records[i].id in seen:
            records[i] = replace(records[i], id=f"{records[i].id}-{number}")
        seen[records[i].id] = records[i].where
    return records


def _format_of(row: Mapping) -> str:
    if "rejected_conversations" in row:
        return "povid"
    if "text" in row and ("origin_dataset" in row or "ds_name" in row):
        return "rlhfv"
    return "trl"


def _from_trl(row: _Row, number: int) -> list[dict]:
    """TRL's vision preference format: what `parse_record` takes."""
    return [{**row.value, **_identity(row, "id", number)}]


def _from_povid(row: _Row, number: int) -> list[dict]:
    """POVID: two conversations, a record for each answer in which they differ."""
    chosen = _turns(row, "conversations")
    rejected = _turns(row, "rejected_conversations")
    if [role for role, _ in chosen] != [role for role, _ in rejected]:
        problem = "its turns are not those of conversations"
        raise refusal(f"{row.at}, rejected_conversations", problem, "give the same turns in both")
    differing = []
    for i, ((role, good), (_, bad)) in enumerate(zip(chosen, rejected, strict=True)):
        if good.strip() == bad.strip():
            continue
        if role == "user":
            problem = "the human turn differs from that of conversations"
            remedy = "let only gpt turns differ"
            raise refusal(f"{row.at}, rejected_conversations[{i}].value", problem, remedy)
        differing.append((i, good, bad))
    answers = [i for i, (role, _) in enumerate(chosen) if role == "assistant"]
    if not answers:
        raise refusal(f"{row.at}, conversations", "has no gpt turn", "give one or drop the record")
    if not differing:  # a pair of identical responses, for whoever reads pairs to refuse or to leave out
        differing = [(answers[-1], chosen[answers[-1]][1], rejected[answers[-1]][1])]
    image = {"image": row.value.get("image"), "images": row.value.get("images")}
    identity = _identity(row, "id", number)
    identity["id_is_ours"] = True  # published ids repeat
    history = [{"role": role, "content": text} for role, text in chosen]
    plain = [
        {**image, **identity, "prompt": history[:i], "chosen": good, "rejected": bad}
        for i, good, bad in differing
    ]
    if len(plain) > 1:
        plain = [{**record, "id": f"{record['id']}-{k}"} for k, record in enumerate(plain)]
    return plain


def _turns(row: _Row, name: str) -> list[tuple[str, str]]:
    """Return (role, text) of each turn of a LLaVA conversation."""
    turns, at = row.value.get(name), f"{row.at}, {name}"
    if not isinstance(turns, list | tuple) or not turns:
        found = type(turns).__name__ if turns is None or turns else "an empty list"
        raise refusal(at, f"found {found}", "give a list of turns with from and value")
    return [_turn(turn, f"{at}[{i}]") for i, turn in enumerate(turns)]


def _turn(turn: Any, at: str) -> tuple[str, str]:
    check_object(turn, at)
    role = {"human": "user", "gpt": "assistant"}.get(str(turn.get("from")))
    if role is None:
        raise refusal(f"{at}.from", f"found {quoted(turn.get('from'))}", "give 'human' or 'gpt'")
    return role, check_text(turn.get("value"), f"{at}.value")


def _from_rlhfv(row: _Row, number: int) -> list[dict]:
    """RLHF-V: one question with both answers, often as JSON in a string."""
    at = f"{row.at}, text"
    text = row.value.get("text")
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise refusal(at, f"is not JSON ({one_line(error)})", "mend it") from error
    check_object(text, at)
    question, chosen, rejected = (
        check_text(text.get(name), f"{at}.{name}") for name in ("question", "chosen", "rejected")
    )
    image = row.value.get("image")
    if image is None or (isinstance(image, Mapping) and all(v is None for v in image.values())):
        image = row.value.get("image_path")
    identity = _identity(row, "idx", number)
    plain = {"image": image, "prompt": question, "chosen": chosen, "rejected": rejected}
    return [{**plain, **identity, "id_is_ours": True}]  # published indices repeat


def _identity(row: _Row, field: str, number: int) -> dict:
    """Return the id of a row: the one given, or one of our own from the row's number."""
    given = row.value.get(field)
    return {"id": record_id(given, number, f"{row.at}, {field}"), "id_is_ours": given is None}


_FORMATS: dict[str, Callable[[_Row, int], list[dict]]] = {
    "trl": _from_trl,
    "povid": _from_povid,
    "rlhfv": _from_rlhfv,
}


# --- files to rows ------------------------------------------------------------------------------


def _read(path: Path) -> Iterator[_Row]:
    name = one_line(path.name)
    if os.path.isdir(path):  # unlike Path's, it takes every odd name
        for part in _parts(path):
            yield from _numbered(_parquet(part), part)
        return
    if not os.path.exists(path):
        raise refusal(name, f"no such file: {quoted(path)}", "check the path")
    readers = {".jsonl": _jsonl, ".json": _json_list, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        problem = f"the suffix {quoted(path.suffix)} is not known"
        raise refusal(name, problem, f"give one of {', '.join(_SUFFIXES)}")
    yield from _numbered(readers[path.suffix.lower()](path), path)


def _parts(folder: Path) -> list[Path]:
    name = one_line(folder.name)
    try:
        parts = sorted(part for part in folder.iterdir() if part.suffix.lower() == ".parquet")
    except OSError as error:
        problem = f"the folder cannot be read ({one_line(error)})"
        raise refusal(name, problem, "check its permissions") from error
    if not parts:
        problem = f"the folder {quoted(folder)} holds no .parquet files"
        raise refusal(name, problem, "give a data file or a folder with some")
    return parts


def _numbered(values: Iterable, path: Path) -> Iterator[_Row]:
    """Number the rows of a file; every way in which it cannot be read becomes one line."""
    name = one_line(path.name)
    try:
        for index, value in enumerate(values):
            yield _Row(value, f"{name} record", index)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        problem = f"cannot be read ({type(error).__name__}: {one_line(error)})"
        raise refusal(name, problem, "check that it is whole and readable") from error


def _jsonl(path: Path) -> Iterator[Any]:
    name = one_line(path.name)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8)
            if line.strip():
                value = _json(line, name, number)
                check_object(value, f"{name} line {number}")
                yield value


def _json_list(path: Path) -> Iterator[Any]:
    name = one_line(path.name)
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        return
    values = _json(data, name, 1)
    if not isinstance(values, list):
        found = f"holds {type(values).__name__} instead of one list of objects"
        raise refusal(name, found, "make it a list, or .jsonl with one object per line")
    yield from values


def _json(data: bytes, name: str, line: int) -> Any:
    """Return the value of JSON that begins at `line` of the file."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        problem = f"is not UTF-8 ({error.reason})"
        raise refusal(f"{name} line {line}", problem, "save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        at = f"{name} line {line + error.lineno - 1}, column {error.colno}"
        remedy = "mend it (.jsonl holds one object per line, .json one list)"
        raise refusal(at, f"is not JSON ({error.msg})", remedy) from error
    except (ValueError, RecursionError) as error:
        problem = f"cannot be read ({one_line(error)})"
        raise refusal(f"{name} line {line}", problem, "mend the value") from error


def _parquet(path: Path) -> Iterator[Any]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()
