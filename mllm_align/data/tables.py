"""Rows of Parquet and Arrow files, whose binary columns (images) are read on demand."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm_align.data.images import OpenedFile, StoredBytes

CACHE_BYTES = 1 << 27  # of the most recently read columns, over all files


class Table(OpenedFile):
    """A file of row groups."""

    @property
    def schema(self) -> pa.Schema:
        raise NotImplementedError

    def batches(self, size: int) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Yield all rows in order, at most `size` at a time: (row group, index of the first row, rows)."""
        raise NotImplementedError

    def column(self, group: int, name: str) -> Any:
        """Return one column of a row group, indexed by row."""
        raise NotImplementedError

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each row as plain values, with a `Cell` in place of bytes."""
        binary = [field for field in self.schema if _has_bytes(field.type)]
        for group, first, batch in self.batches(128 if binary else 1024):
            for number, row in enumerate(batch.to_pylist(), first):
                for field in binary:
                    cell = Cell(self, group, number, (field.name,))
                    row[field.name] = _without_bytes(row[field.name], field.type, cell)
                yield row


@dataclass(frozen=True, slots=True)
class Cell(StoredBytes):
    """Bytes in a row of a table; `steps`: the path to them: the column, then fields and list indices."""

    table: Table
    group: int
    row: int
    steps: tuple[str | int, ...]

    def read(self) -> bytes:
        value = self.table.column(self.group, str(self.steps[0]))[self.row].as_py()
        for step in self.steps[1:]:
            value = value[step]
        return value


def _has_bytes(dtype: pa.DataType) -> bool:
    if pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_binary_view(dtype):
        return True
    return any(_has_bytes(dtype.field(i).type) for i in range(dtype.num_fields))


class _Unread:
    """Placeholder for bytes that were not read: the column has no null."""


_UNREAD = _Unread()


def _without_bytes(value: Any, dtype: pa.DataType, cell: Cell) -> Any:
    """Replace the bytes in a value by their location; `cell` is the location of the value."""

    def inside(inner: Any, step: str | int, dtype: pa.DataType) -> Any:
        return _without_bytes(inner, dtype, Cell(cell.table, cell.group, cell.row, (*cell.steps, step)))

    if isinstance(value, bytes | _Unread):
        return cell
    if isinstance(value, dict) and pa.types.is_struct(dtype):
        return {f.name: inside(value.get(f.name, _UNREAD), f.name, f.type) for f in dtype}
    if isinstance(value, list) and dtype.num_fields == 1:
        return [inside(each, i, dtype.field(0).type) for i, each in enumerate(value)]
    return value


class _ColumnCache:
    """The most recently read columns, up to `capacity` bytes: neighbouring records are read together."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._held = 0  # bytes; summing them at every read would take longer than the read
        self._columns: OrderedDict[tuple[Table, int, str], pa.ChunkedArray] = OrderedDict()
        self._reading: dict[tuple[Table, int, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[Table, int, str], read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:  # threads that need the same column wait, others read meanwhile
            with self._lock:
                column = self._columns.pop(key, None)
            new = column is None
            column = read() if column is None else column
            with self._lock:
                self._columns[key] = column
                self._held += column.nbytes if new else 0
                while len(self._columns) > 1 and self._held > self.capacity:
                    self._held -= self._columns.popitem(last=False)[1].nbytes
        return column


_columns = _ColumnCache(CACHE_BYTES)


class ParquetTable(Table):
    """A Parquet file. Reading a row's bytes reads the column of its whole row group, unless it is
    cached."""

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        return pq.read_metadata(self.path)

    @property
    def schema(self) -> pa.Schema:
        return self._footer.schema.to_arrow_schema()

    def batches(self, size: int) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        with pq.ParquetFile(self.path, metadata=self._footer) as file:
            for group in range(file.num_row_groups):
                first = 0
                for batch in file.iter_batches(size, row_groups=[group], columns=self._leaves(group)):
                    yield group, first, batch
                    first += len(batch)

    def _leaves(self, group: int) -> list[str]:
        """The columns to read for rows: all but the bytes of structs without a null, if the struct has
        other fields, which then give the number of values."""
        schema, columns = self._footer.schema, self._footer.row_group(group)
        bytes_alone = {i: _are_all_bytes(columns.column(i), schema.column(i)) for i in range(len(schema))}
        names = [columns.column(i).path_in_schema for i in bytes_alone]
        others = {_struct(names[i]) for i, alone in bytes_alone.items() if not alone}
        return [name for i, name in enumerate(names) if not (bytes_alone[i] and _struct(name) in others)]

    def column(self, group: int, name: str) -> Any:
        def read() -> pa.ChunkedArray:
            with pq.ParquetFile(self.path, metadata=self._footer) as file:  # threads can't share one
                return file.read_row_group(group, columns=[name]).column(name)

        return _columns.get((self, group, name), read)


def _struct(path: str) -> str:
    return path.rpartition(".")[0]


def _are_all_bytes(column: pq.ColumnChunkMetaData, schema: pq.ColumnSchema) -> bool:
    if (
        not _struct(column.path_in_schema)
        or column.physical_type != "BYTE_ARRAY"
        or schema.logical_type.type != "NONE"
    ):
        return False
    return column.is_stats_set and column.statistics.has_null_count and column.statistics.null_count == 0


class ArrowTable(Table):
    """An Arrow file or stream, as saved by `datasets`: memory-mapped, so nothing is copied."""

    @cached_property
    def _opened(self) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        mapped = pa.memory_map(str(self.path))
        if mapped.read(6) == b"ARROW1":
            file = pa.ipc.open_file(mapped)
            return file.schema, [file.get_batch(i) for i in range(file.num_record_batches)]
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        return stream.schema, list(stream)

    @property
    def schema(self) -> pa.Schema:
        return self._opened[0]

    def batches(self, size: int) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        for group, batch in enumerate(self._opened[1]):
            batch.validate(full=True)  # a damaged offset could point anywhere in memory
            for first in range(0, len(batch), size):
                yield group, first, batch.slice(first, size)

    def column(self, group: int, name: str) -> Any:
        return self._opened[1][group].column(name)
