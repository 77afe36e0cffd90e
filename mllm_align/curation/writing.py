"""Records as a file that `train` reads: Parquet with the images, or lines that name their files."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mllm_align.curation.items import Item
from mllm_align.data.images import ImageSource
from mllm_align.data.records import OTHERS
from mllm_align.errors import refusal
from mllm_align.files import json_text, new_file

IMAGES = ("images", *OTHERS)
GROUP = 20  # rows of a row group: reading one image reads all of its group


def check_name(out: Path) -> None:
    """Raises InputError for a name that `write` can't make a file of."""
    if out.suffix.lower() not in (".parquet", ".jsonl"):
        raise refusal(str(out), "is no .parquet or .jsonl name", "give --out one of these")


def write(items: Sequence[Item], out: Path) -> None:
    """Write records in TRL's format, whole or not at all. Raises InputError where it can't be written, and
    for an image that can't be read."""
    (_write_parquet if out.suffix.lower() == ".parquet" else _write_jsonl)(items, out)


def rows_of(items: Iterable[Item], image: Callable[[ImageSource], Any]) -> Iterator[dict[str, Any]]:
    """Rows in TRL's format, with ids that do not repeat."""
    seen: Counter[str] = Counter()
    for item in items:
        record = item.record
        id = record.id
        while seen[id]:
            id = f"{record.id}-{seen[record.id]}"
            seen[record.id] += 1
        seen[id] += 1
        row = {"id": id, "images": [image(source) for source in record.images]}
        row |= {name: [*map(image, getattr(record, name))] for name in OTHERS if getattr(record, name)}
        row["prompt"] = [message.chat() for message in record.messages]
        row["chosen"] = record.responses[0]
        if item.rejected is not None:
            row["rejected"] = item.rejected
        if len(record.responses) > 2:
            row["responses"] = list(record.responses[2:])
        yield row | {"source": item.source} | _further(item.fields, row)


def _further(fields: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in row and value is not None}


# ---- JSONL -------------------------------------------------------------------------------------------


def _write_jsonl(items: Sequence[Item], out: Path) -> None:
    with new_file(out) as file:
        for row in rows_of(items, lambda source: _named(source, out)):
            file.write(json_text(row) + "\n")


def leads_outside(out: Path) -> bool:
    """Whether a mixed file names images outside its folder: readers take these when they are told to."""
    if out.suffix.lower() != ".jsonl":
        return False
    with open(out, encoding="utf-8") as file:
        rows = map(json.loads, file)
        return any(Path(i).is_absolute() for row in rows for n in IMAGES for i in row.get(n, ()))


def _named(source: ImageSource, out: Path) -> str:
    """An image's file: relative to the folder of `out` where it lies in it, else from the root. An image
    that is no file is written beside `out`."""
    path = source.path
    if path is None:
        data = encoded(source)
        suffix = (Image.open(io.BytesIO(data)).format or "png").lower()
        folder = out.resolve().with_name(out.stem + "-images")
        path = folder / f"{hashlib.sha256(data).hexdigest()[:20]}.{suffix}"
        if not path.exists():
            with new_file(path, "wb") as file:
                file.write(data)
    folder = out.resolve().parent
    return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)


def encoded(source: ImageSource) -> bytes:
    """The bytes of an image's file."""
    data = source.read()
    assert data is not None  # of files, images are never decoded yet
    return data


# ---- Parquet -----------------------------------------------------------------------------------------


def _write_parquet(items: Sequence[Item], out: Path) -> None:
    schema = _schema(items)
    rows = rows_of(items, lambda source: {"bytes": encoded(source), "path": _label(source)})
    with new_file(out, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        while several := list(islice(rows, GROUP)):
            plain = [
                {each.name: _plain(row.get(each.name), each.type) for each in schema} for row in several
            ]
            writer.write_table(pa.Table.from_pylist(plain, schema))


def _label(source: ImageSource) -> str | None:
    return None if source.path is None else source.path.name


def _schema(items: Sequence[Item]) -> pa.Schema:
    """Of all rows: other fields are columns of one plain type, or of JSON text."""
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    picture = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    others = (name for name in OTHERS if any(getattr(item.record, name) for item in items))
    columns: dict[str, pa.DataType] = {
        "id": pa.string(),
        "images": picture,
        **dict.fromkeys(others, picture),
        "prompt": pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))])),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "responses": pa.list_(pa.string()),
        "source": pa.string(),
    }
    kinds: dict[str, set[type]] = {}
    for item in items:
        for name, value in _further(item.fields, columns).items():
            kinds.setdefault(name, set()).add(type(value))
    columns |= {name: _column(kinds[name]) for name in sorted(kinds)}
    return pa.schema(list(columns.items()))


def _column(kinds: set[type]) -> pa.DataType:
    plain: dict[type, pa.DataType] = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    if kinds == {int, float}:
        return pa.float64()
    return plain.get(next(iter(kinds)), pa.string()) if len(kinds) == 1 else pa.string()


def _plain(value: Any, dtype: pa.DataType) -> Any:
    if pa.types.is_string(dtype) and value is not None and not isinstance(value, str):
        return json_text(value)
    return value
