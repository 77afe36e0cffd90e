"""Encoded records as flat arrays: the format in which processes exchange them, and of the cache on disk.

Encoding takes nearly a millisecond per record: template, tokenizer, image headers. A large data set is
encoded on all cores, and the result is cached beside the data under a digest of everything it depends on:
texts, images (path, size, modification time), tokenizer, template and image layout.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm_align.data.encode import Encoded, Encoder, Identical
from mllm_align.data.preferences import conversation
from mllm_align.data.records import Record
from mllm_align.data.rejected_image import rejected_record, with_second
from mllm_align.errors import InputError, refusal
from mllm_align.files import new_file

MIN_CACHED = 4096
"""Smallest number of records for which a table is cached."""
MIN_PARALLEL = 16384
"""Smallest number of records for which worker processes, which take seconds to start, are used."""
MAX_PROCESSES = 16
"""Worker processes at a time: each takes about 250 MB."""
PART = 1024
"""Records per task of a worker process."""
MAX_FILES = 4
"""Cached tables in one folder: the most recently used."""
FOLDER = ".mllm_align"


@dataclass(frozen=True)
class Table:
    """N encoded records with K responses each.

    ids: tokens of all prompts and responses, concatenated. lengths [N, 1 + K]: their lengths; all 0 for a
    record with identical responses. sizes [images, 2]: (width, height) of all images. images [N]: number of
    images of each record.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    images: np.ndarray

    @classmethod
    def of(cls, encoded: Sequence[Encoded | Identical], responses: int) -> Table:
        nothing = (np.zeros(0, np.int32),) * (1 + responses)
        rows = [nothing if isinstance(e, Identical) else (e.prefix, *e.responses) for e in encoded]
        sizes = [() if isinstance(each, Identical) else each.sizes for each in encoded]
        return cls(
            np.concatenate([ids for row in rows for ids in row]),
            np.array([[len(ids) for ids in row] for row in rows], np.int32),
            np.array([size for each in sizes for size in each], np.int32).reshape(-1, 2),
            np.array([len(each) for each in sizes], np.int32),
        )

    @classmethod
    def joined(cls, tables: Sequence[Table]) -> Table:
        return cls(*(np.concatenate([getattr(table, name) for table in tables]) for name in NAMES))

    def encoded(self, records: Sequence[Record], encoder: Encoder) -> Iterator[Encoded | Identical]:
        """The encoded records, as views of these arrays."""
        ends, last = np.cumsum(self.lengths).reshape(self.lengths.shape), np.cumsum(self.images)
        starts = ends - self.lengths
        sizes = [tuple(size) for size in self.sizes.tolist()]
        for index, record in enumerate(records):
            if not self.lengths[index].any():
                yield _encoded(record, encoder, self.lengths.shape[1] - 1, index)
                continue
            prefix, *answers = (self.ids[a:b] for a, b in zip(starts[index], ends[index], strict=True))
            own = tuple(sizes[last[index] - self.images[index] : last[index]])
            yield encoder.encoded(record, prefix, tuple(answers), own, index)


NAMES = [field.name for field in fields(Table)]


class LeftOut(NamedTuple):
    """A record that is left out: its index in the data, its id, and why ("over-long" or "identical")."""

    index: int
    id: str
    why: str


def counted(left_out: Sequence[LeftOut]) -> str:
    """Number of records left out for each reason, such as "2 over-long and 1 identical"."""
    reasons = Counter(each.why for each in left_out)
    return " and ".join(f"{count} {why}" for why, count in reasons.items())


def encode_all(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    responses: int,
    max_length: int,
    over_long: str = "refuse",
    identical: str = "refuse",
    max_new_tokens: int = 0,
    opening: bool = False,
    beside: Path | None = None,
    tell: Callable[[int], Any] = lambda count: None,
    rejected_image: str | None = None,
) -> tuple[list[Encoded], list[LeftOut]]:
    """Encode all records: (encoded, left out). Left out are over-long records, of more than `max_length`
    tokens, and those with identical responses.

    max_new_tokens: tokens reserved for a response to be generated. opening: see `Encoder.encode`; beside,
    tell: see `encode_each`. rejected_image: what a second prefix shows, None for groups of one prefix.
    Nothing is ever truncated. Raises InputError for such a record unless over_long, or identical, is
    "skip", and if no record is left.
    """
    kept, left_out = [], []
    every = encode_each(records, encoder, responses, beside, tell, opening)
    if rejected_image is not None:
        every = _with_second(every, records, encoder, responses, beside, opening, rejected_image)
    for index, (record, encoded) in enumerate(zip(records, every, strict=True)):
        if isinstance(encoded, Identical):
            if identical != "skip":
                raise encoded
            left_out.append(LeftOut(index, record.id, "identical"))
            continue
        longest = max(prefix for prefix, _ in encoded.shape.prefixes)
        length = longest + max(encoded.shape.response, max_new_tokens)
        if length <= max_length:
            kept.append(encoded)
        elif over_long == "skip":
            left_out.append(LeftOut(index, record.id, "over-long"))
        else:
            problem = f"prompt and longest response are {length} tokens, the limit is {max_length}"
            remedy = "shorten it, raise --data.max-length, or leave such records out: --data.over-long skip"
            raise refusal(record.where, problem, remedy)
    if not kept:
        raise InputError(
            f"all {len(left_out)} records are left out, {counted(left_out)}; give others, or raise "
            f"--data.max-length above {max_length}"
        )
    return kept, left_out


def _with_second(
    every: Iterator[Encoded | Identical],
    records: Sequence[Record],
    encoder: Encoder,
    responses: int,
    beside: Path | None,
    opening: bool,
    kind: str,
) -> Iterator[Encoded | Identical]:
    """Each record with its second prefix. Images of its own are encoded as a data set of its own is."""
    others = [rejected_record(record, kind) for record in records]
    second: Iterable[Encoded | Identical | None] = [None] * len(records)
    if kind == "record":
        second = encode_each(others, encoder, responses, beside, opening=opening)
    for encoded, other in zip(every, second, strict=True):
        if isinstance(encoded, Identical):
            yield encoded
        elif isinstance(other, Identical):
            yield other
        else:
            yield with_second(encoded, kind, other)


def encode_each(
    records: Sequence[Record],
    encoder: Encoder,
    responses: int,
    beside: Path | None = None,
    tell: Callable[[int], Any] = lambda count: None,
    opening: bool = False,
) -> Iterator[Encoded | Identical]:
    """Encode each record, in order; yields the error `Identical` for a record with identical responses.
    Raises InputError for the first record that can't be encoded.

    beside: a folder in which large tables are cached, in `.mllm_align`; None caches none. tell: called with
    the number of records done since the last call.
    """
    if len(records) < MIN_CACHED:
        for index, record in enumerate(records):
            yield _encoded(record, encoder, responses, index, opening)
            tell(1)
        return
    name = digest(records, encoder, responses, opening)
    file = None if beside is None else beside / FOLDER / f"{name}.npz"
    table = None if file is None else _read(file, len(records), responses)
    if table is None:
        table = Table.joined(list(_encode_parallel(records, encoder, responses, opening, tell)))
        if file is not None:
            _keep(file, table)
    else:
        tell(len(records))
    yield from table.encoded(records, encoder)


def _encoded(
    record: Record, encoder: Encoder, responses: int, index: int, opening: bool = False
) -> Encoded | Identical:
    try:
        return encoder.encode(record, responses, index, opening)
    except Identical as fault:
        return fault


# ---- worker processes --------------------------------------------------------------------------------


def _encode_parallel(
    records: Sequence[Record],
    encoder: Encoder,
    responses: int,
    opening: bool,
    tell: Callable[[int], Any],
) -> Iterator[Table]:
    """Tables of PART records each, in order, by one process per core, at most MAX_PROCESSES."""
    from joblib import Parallel, cpu_count, delayed
    from joblib.externals.loky import get_reusable_executor

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "encoder.pickle"
        file.write_bytes(pickle.dumps(encoder))
        parts = (
            delayed(_part)(file, records[start : start + PART], start, responses, opening)
            for start in range(0, len(records), PART)
        )
        processes = min(cpu_count(), MAX_PROCESSES) if len(records) >= MIN_PARALLEL else 1
        tables: Any = Parallel(n_jobs=processes, return_as="generator")(parts)
        try:
            for table in tables:  # in order: the first error is that of the first faulty record
                if isinstance(table, InputError):
                    raise table
                tell(len(table.lengths))
                yield table
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about tasks that are abandoned after an error
                tables.close()
            if processes > 1:
                get_reusable_executor().shutdown(kill_workers=True)


def _part(
    file: Path, records: Sequence[Record], first: int, responses: int, opening: bool
) -> Table | InputError:
    encoder = _opened(file)
    try:
        made = [_encoded(each, encoder, responses, first + i, opening) for i, each in enumerate(records)]
    except InputError as fault:
        return fault
    return Table.of(made, responses)


@cache
def _opened(file: Path) -> Encoder:
    return pickle.loads(file.read_bytes())


# ---- the cache on disk -------------------------------------------------------------------------------


def digest(records: Sequence[Record], encoder: Encoder, responses: int, opening: bool) -> str:
    """Digest of everything that a table depends on."""
    state = hashlib.sha256(f"{encoder.fingerprint} {responses} {opening}".encode())
    for record in records:
        texts = [(m.role, [part.text for part in m.content]) for m in conversation(record)]
        state.update(repr((texts, record.responses[:responses], *map(_image, record.images))).encode())
    return state.hexdigest()[:24]


def _image(source: Any) -> tuple[Any, ...]:
    if source.stored is not None:  # its key identifies the file that contains it
        return (source.key,)
    if source.path is None:
        data = source.data if source.data is not None else source.image.tobytes()
        return (hashlib.sha256(data).hexdigest(),)
    try:
        found = os.stat(source.path)
    except OSError:  # encoding reports it
        return (str(source.path),)
    return str(source.path), found.st_size, found.st_mtime_ns


def _read(file: Path, count: int, responses: int) -> Table | None:
    """The cached table; None if it is absent or damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            table = Table(*(arrays[name] for name in NAMES))
        os.utime(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    complete = len(table.lengths) == len(table.images) == count
    complete = complete and table.lengths.sum() == len(table.ids)
    complete = complete and table.images.sum() == len(table.sizes)
    return table if complete else None


def _keep(file: Path, table: Table) -> None:
    """Write the table to the cache, if its folder is writable, and remove the oldest files."""
    with suppress(InputError, OSError):
        with new_file(file, "wb") as opened:
            np.savez(opened, **dict(zip(NAMES, astuple(table), strict=True)))
        others = sorted(file.parent.glob("*.npz"), key=lambda other: other.stat().st_mtime)
        for other in others[:-MAX_FILES]:
            other.unlink()
