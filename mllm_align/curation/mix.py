"""Several data sets into one file, by weight."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mllm_align.config import DataConfig
from mllm_align.config.checks import STEPS, check_number
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.where import Where, everywhere
from mllm_align.data.images import ImageSource
from mllm_align.data.mixture import Weighted, check_shares, most, set_names, shares
from mllm_align.data.readers import told
from mllm_align.errors import InputError, refusal
from mllm_align.files import json_text, new_file

GROUP = 100  # rows of a row group: reading one image reads all of its group


def mix(
    sets: Sequence[Weighted],
    out: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    where: str | None = None,
    data: DataConfig | None = None,
) -> list[dict[str, Any]]:
    """Write `out`, a data set drawn from others: of every set its share, none of them twice.

    limit: records of the result; None: as many as the shares allow. where: see `Where`. The same arguments
    and files give the same file. Returns for each set its name, records, left_out (by its format's rules),
    filtered, taken. Raises InputError for data that can't be read, where a set has too few records, and
    where no record is left.
    """
    suffix, config = out.suffix.lower(), data or DataConfig()
    if suffix not in (".parquet", ".jsonl"):
        raise refusal(str(out), "is no .parquet or .jsonl name", "give --out one of these")
    check_number("--limit", 1 if limit is None else limit, 1, STEPS)
    check_number("--seed", seed, 0, 2**63 - 1)
    names = set_names([each.file for each in sets])
    weights, found, kept = [each.weight for each in sets], [], []
    keep = everywhere if where is None else Where(where)
    for name, file in names.items():
        dropped: Counter[str] = Counter()
        good = [keep(item) for item in read_items(file, name, config, dropped)]
        kept.append(np.flatnonzero(good))
        found.append({"set": name, "records": len(good), "left_out": dict(+dropped)})
        found[-1] |= {"filtered": good.count(False)}
    if isinstance(keep, Where):
        keep.check()
    there = [len(each) for each in kept]
    counts = shares(most(there, weights) if limit is None else limit, weights)
    check_shares(counts, there, list(names), "--limit")
    if not sum(counts):
        raise InputError(f"no record is left of {', '.join(names)}; let --where keep some")
    items: list[Item] = []
    for number, (name, file) in enumerate(names.items()):
        chosen = np.random.default_rng((seed, number)).permutation(kept[number])[: counts[number]]
        wanted = set(chosen.tolist())
        items += [item for i, item in enumerate(read_items(file, name, config)) if i in wanted]
        found[number]["taken"] = counts[number]
    order = np.random.default_rng((seed, len(sets))).permutation(len(items))
    items = [items[i] for i in order]
    (_write_parquet if suffix == ".parquet" else _write_jsonl)(items, out)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """What came of each set, a line each."""
    lines = []
    for each in found:
        left_out = told(Counter(each["left_out"]))
        notes = [f"{each['filtered']:,} filtered out"] * bool(each["filtered"]) + [left_out] * bool(
            left_out
        )
        lines.append(f"{each['set']}: {each['taken']:,} of {each['records']:,} records" + _listed(notes))
    return "\n".join(lines)


def _listed(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""


def _rows(items: Sequence[Item], image: Callable[[ImageSource], Any]) -> Iterator[dict[str, Any]]:
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
        for row in _rows(items, lambda source: _named(source, out)):
            file.write(json_text(row) + "\n")


def leads_outside(out: Path) -> bool:
    """Whether a mixed file names images outside its folder: readers take these when they are told to."""
    if out.suffix.lower() != ".jsonl":
        return False
    with open(out, encoding="utf-8") as file:
        return any(Path(name).is_absolute() for line in file for name in json.loads(line)["images"])


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
    rows = _rows(items, lambda source: {"bytes": encoded(source), "path": _label(source)})
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
    columns: dict[str, pa.DataType] = {
        "id": pa.string(),
        "images": pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
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
