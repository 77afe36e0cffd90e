"""Encoded records as flat arrays: what other processes hand back, and what is kept for the next start.

Encoding takes most of a millisecond a record: templates, tokens, image headers. A large data set is shared
out over the cores, and what came of it is kept beside the data, named by a digest of all that it follows
from: texts, images (path, size, time of the last change), tokenizer, template and image layout.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm_align.data.encode import Encoded, Encoder, Identical
from mllm_align.data.records import Record
from mllm_align.errors import InputError, refusal
from mllm_align.files import new_file

LARGE = 4096
"""Records from which on a table is kept."""
SHARED = 16384
"""Records from which on other processes, which take seconds to start, are worth it."""
MOST = 16
"""Processes at once: each takes some 250 MB."""
PART = 1024
"""Records that a process takes at once."""
KEPT = 4
"""Files kept in one folder: those used last."""
FOLDER = ".mllm_align"


@dataclass(frozen=True)
class Table:
    """N encoded records with K responses each.

    ids: tokens of prompts and responses, one after the other. lengths [N, 1 + K]: how many each has; none
    at all where responses are identical. sizes [images, 2]: (width, height) of all images. images [N]: how
    many each record has.
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
        """The records again, with views of these arrays."""
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
    """A record that is not worked on: its place in the data, its id, why ("over-long" or "identical")."""

    index: int
    id: str
    why: str


def counted(left_out: Sequence[LeftOut]) -> str:
    """How many records were left out for what, as "2 over-long and 1 identical"."""
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
    room: int = 0,
    opening: bool = False,
    beside: Path | None = None,
    tell: Callable[[int], Any] = lambda count: None,
) -> tuple[list[Encoded], list[LeftOut]]:
    """All records encoded, and those left out: over-long ones, of more than `max_length` tokens, and those
    with identical responses.

    room: tokens that a response still to be made may take. opening: see `Encoder.encode`; beside, tell: see
    `encode_each`. Nothing is ever cut. Raises InputError for such a record unless over_long, or identical,
    is "skip", and when none is left.
    """
    kept, left_out = [], []
    every = zip(records, encode_each(records, encoder, responses, beside, tell, opening), strict=True)
    for index, (record, encoded) in enumerate(every):
        if isinstance(encoded, Identical):
            if identical != "skip":
                raise encoded
            left_out.append(LeftOut(index, record.id, "identical"))
            continue
        length = encoded.shape.prefix + max(encoded.shape.response, room)
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


def encode_each(
    records: Sequence[Record],
    encoder: Encoder,
    responses: int,
    beside: Path | None = None,
    tell: Callable[[int], Any] = lambda count: None,
    opening: bool = False,
) -> Iterator[Encoded | Identical]:
    """Every record encoded, or its fault where responses are identical, in order. Raises InputError for the
    first record that can't be encoded.

    beside: a folder next to which large tables are kept; None keeps none. tell: called with the number of
    records done since the last call.
    """
    if len(records) < LARGE:
        for index, record in enumerate(records):
            yield _encoded(record, encoder, responses, index, opening)
            tell(1)
        return
    name = digest(records, encoder, responses, opening)
    file = None if beside is None else beside / FOLDER / f"{name}.npz"
    table = None if file is None else _read(file, len(records), responses)
    if table is None:
        table = Table.joined(list(_shared_out(records, encoder, responses, opening, tell)))
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


# ---- the cores ---------------------------------------------------------------------------------------


def _shared_out(
    records: Sequence[Record],
    encoder: Encoder,
    responses: int,
    opening: bool,
    tell: Callable[[int], Any],
) -> Iterator[Table]:
    """Tables of PART records each, in order, made by a process for each core, MOST of them."""
    from joblib import Parallel, cpu_count, delayed
    from joblib.externals.loky import get_reusable_executor

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "encoder.pickle"
        file.write_bytes(pickle.dumps(encoder))
        parts = (
            delayed(_part)(file, records[start : start + PART], start, responses, opening)
            for start in range(0, len(records), PART)
        )
        processes = min(cpu_count(), MOST) if len(records) >= SHARED else 1
        tables: Any = Parallel(n_jobs=processes, return_as="generator")(parts)
        try:
            for table in tables:  # in order: the first fault is that of the first record
                if isinstance(table, InputError):
                    raise table
                tell(len(table.lengths))
                yield table
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of work that a fault made useless
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


# ---- the file ----------------------------------------------------------------------------------------


def digest(records: Sequence[Record], encoder: Encoder, responses: int, opening: bool) -> str:
    """Names all that a table follows from."""
    told = hashlib.sha256(f"{encoder.fingerprint} {responses} {opening}".encode())
    for record in records:
        texts = [(m.role, [part.text for part in m.content]) for m in record.messages]
        told.update(repr((texts, record.responses[:responses], *map(_image, record.images))).encode())
    return told.hexdigest()[:24]


def _image(source: Any) -> tuple[Any, ...]:
    if source.stored is not None:  # its key tells of the file that it lies in
        return (source.key,)
    if source.path is None:
        data = source.data if source.data is not None else source.image.tobytes()
        return (hashlib.sha256(data).hexdigest(),)
    try:
        found = os.stat(source.path)
    except OSError:  # told when it is encoded
        return (str(source.path),)
    return str(source.path), found.st_size, found.st_mtime_ns


def _read(file: Path, count: int, responses: int) -> Table | None:
    """The table; None where there is none or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            table = Table(*(arrays[name] for name in NAMES))
        os.utime(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = len(table.lengths) == len(table.images) == count
    whole = whole and table.lengths.sum() == len(table.ids) and table.images.sum() == len(table.sizes)
    return table if whole else None


def _keep(file: Path, table: Table) -> None:
    """Write it, unless the folder can't be written to: then the next start takes as long as this one."""
    with suppress(InputError, OSError):
        with new_file(file, "wb") as opened:
            np.savez(opened, **dict(zip(NAMES, astuple(table), strict=True)))
        others = sorted(file.parent.glob("*.npz"), key=lambda other: other.stat().st_mtime)
        for other in others[:-KEPT]:
            other.unlink()
