"""Records from data sets in files and from rows in memory."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mllm_align.data.files import Row, read_rows
from mllm_align.data.formats.base import Pairs, Reader, Taking, beside, convert, format_of, reader_of
from mllm_align.data.preferences import FIELD, parse_preferences
from mllm_align.data.records import Record, check_object, parse_record
from mllm_align.data.roots import Roots
from mllm_align.data.shards import data_files
from mllm_align.errors import one_line, quoted, refusal

Folders = str | os.PathLike | Sequence[str | os.PathLike] | None
Source = str | os.PathLike | Iterable[Mapping[str, Any] | Record]


class Read(NamedTuple):
    """A record as it is read. number: of its row, if the record's id is ours to change. plain: what its
    reader made of the row."""

    record: Record
    number: int | None
    row: Row
    plain: Mapping[str, Any]
    reader: Reader | None

    @property
    def fields(self) -> dict[str, Any]:
        """What else the row says, and what its reader says of it."""
        return {} if self.reader is None else beside(self.row, self.reader, self.plain)


def records_from(data: Source, *, dropped: Counter[str] | None = None, **options: Any) -> list[Record]:
    """Return the records of a data set in files (see `data_files`) or of rows in memory.

    Takes what `read_each` does. Raises `InputError` where that does, for data without a record and for
    repeated ids.
    """
    dropped = Counter() if dropped is None else dropped
    records: list[Record] = []
    ours: dict[int, int] = {}  # records whose ids we may change -> the number of their row
    for each in read_each(data, dropped=dropped, **options):
        if each.number is not None:
            ours[len(records)] = each.number
        records.append(each.record)
    if not records:
        left_out = told(dropped)
        raise refusal(_name(data), f"holds no records{left_out and ' but '}{left_out}", "give at least one")
    return _with_unique_ids(records, ours)


def read_each(
    data: Source,
    *,
    format: str = "auto",
    image_root: Folders = None,
    allow_outside: bool = False,
    responses: int = 2,
    split: str | None = None,
    max_records: int | None = None,
    pairs: Pairs = "best-worst",
    unpaired: bool = False,
    dropped: Counter[str] | None = None,
) -> Iterator[Read]:
    """Yield the records of a data set in files or of rows in memory, one by one as they are read.

    Rows may hold decoded images, and `Record`s pass as they are. Without `image_root` their image
    paths are relative to the current folder and may lead anywhere; those of a file are relative to its
    folder and may leave it only with `allow_outside`. `format`: one of `READERS`, a user's reader as
    `file.py:function`, or auto, which goes by the first row's fields. `responses`: how many a record needs
    at least. `split`: of the data set. `max_records`: how many are read, the
    first. `pairs`: which pairs of rated responses are made. `unpaired`: see `parse_record`. `dropped`
    counts what is left out, by the reason. Raises `InputError` for data that is missing, unreadable or not
    what its name says and for any faulty record. Ids may repeat.
    """
    reader = None if format == "auto" else reader_of(format)
    taking = Taking(pairs, Counter() if dropped is None else dropped)
    rows = _rows(data, _folders(image_root), allow_outside, split)
    return islice(_parsed(rows, reader, responses, unpaired, taking), max_records)


def _rows(data: Source, folders: list[Path], allow_outside: bool, split: str | None) -> Iterator[Row]:
    if isinstance(data, str | os.PathLike):
        files = data_files(data, split=split, image_root=folders, allow_outside=allow_outside)
        return (row for file in files for row in read_rows(file))
    if isinstance(data, Mapping | bytes) or not isinstance(data, Iterable):
        raise refusal("data", f"found {type(data).__name__}", "give a path or a list of records")
    roots = Roots(folders, allow_outside)
    return (Row(value, "record", index, roots) for index, value in enumerate(data))


def _name(data: Source) -> str:
    return one_line(Path(data).name or data) if isinstance(data, str | os.PathLike) else "data"


def _folders(given: Folders) -> list[Path]:
    several = [given] if isinstance(given, str | os.PathLike) else given or ()
    for path in several:
        if not os.path.isdir(path):
            raise refusal("image_root", f"{quoted(path)} is not a folder", "give the images' folder")
    return [Path(path).resolve() for path in several]


def _parsed(
    rows: Iterable[Row], reader: Reader | None, responses: int, unpaired: bool, taking: Taking
) -> Iterator[Read]:
    for number, row in enumerate(rows):
        if isinstance(row.value, Record):
            yield Read(row.value, None, row, {}, None)
            continue
        check_object(row.value, row.at)
        if reader is None:
            reader = reader_of(format_of(row.value))
        for plain in convert(row, number, reader, taking):
            ours = plain.pop("id_is_ours")
            about: dict[str, Any] = {"index": row.index, "where": row.where, "root": row.roots}
            record = parse_record(plain, **about, responses=responses, unpaired=unpaired)
            if plain.get(FIELD) is not None:
                preferences = parse_preferences(plain[FIELD], record.where)
                record = replace(record, preferences=preferences)
            yield Read(record, number if ours else None, row, plain, reader)


def told(dropped: Counter[str]) -> str:
    """What is left out, in words: `12 ties, 1 identical pair`; empty for nothing."""
    return ", ".join(f"{n} {_plural(what, n)}" for what, n in dropped.most_common() if n)


def _plural(what: str, count: int) -> str:
    if count == 1:
        return what
    head, _, rest = what.partition(" with")
    return f"{head}s{' with' if rest else ''}{rest}"


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
