"""Rows of ArrayRecord files as tensorflow-datasets writes them; TensorFlow is not needed.

A file holds examples, which are protocol buffers; `features.json` beside it says what their fields are. Any
record is read by itself, so images are read when their pixels are needed, and a process reads those of its
own rows alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mllm_align.data.images import OpenedFile, StoredBytes
from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import parse_json

FEATURES, INFO = "features.json", "dataset_info.json"
FIELDS = "json_fields"  # in the metadata: the field with an object of further fields, as JSON text
TOGETHER = 128  # examples read at once
REMEDY = "build the data set again"


def tensorflow_datasets() -> Any:
    """The package, imported when it is needed. Raises InputError where it, or array_record, is missing."""
    try:
        import array_record.python.array_record_module  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        problem = f"ArrayRecord files need the package {error.name}, which is not installed"
        raise InputError(f"{problem}; pip install tensorflow-datasets array_record") from error
    return tensorflow_datasets


def is_built(folder: Path) -> bool:
    """Whether a folder has a data set that tensorflow-datasets wrote."""
    return (folder / FEATURES).is_file() and (folder / INFO).is_file()


def opened(folder: Path) -> Any:
    """The `DatasetInfo` of such a folder. Raises InputError where it can't be read, or has other files."""
    tensorflow_datasets()  # refuses a machine without it
    info = folder / INFO
    return _opened(folder, info.stat().st_mtime_ns if info.exists() else 0)


@lru_cache(8)
def _opened(folder: Path, written: int) -> Any:
    try:
        info = tensorflow_datasets().builder_from_directory(folder).info
        known = info.features is not None and isinstance(info.splits, dict)
    except Exception as error:  # a damaged file raises almost anything
        problem = f"is no readable data set of tensorflow-datasets ({one_line(error, 200)})"
        raise refusal(str(folder), problem, REMEDY) from error
    if not known or info.file_format.value != "array_record":
        found = "no features" if not known else f"files of format {info.file_format.value}"
        raise refusal(str(folder), f"has {found}", 'build it with file_format="array_record"')
    return info


def files_of(folder: Path) -> list[tuple[str, Path]]:
    """Splits and their files, in order. Raises InputError for one that is missing."""
    found = [(split, folder / name) for split, of in opened(folder).splits.items() for name in of.filenames]
    for _, file in found:
        if not file.is_file():
            raise refusal(str(folder), f"the listed file {file.name} is missing", REMEDY)
    return sorted(found, key=lambda each: each[1].name)


class ArrayRecords(OpenedFile):
    """One file of records."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._lock = threading.Lock()

    @cached_property
    def _reader(self) -> Any:
        """Threads may share it."""
        from array_record.python.array_record_module import ArrayRecordReader

        # without read-ahead, which would read what random access does not want
        return ArrayRecordReader(str(self.path), "readahead_buffer_size:0", file_reader_buffer_size=32768)

    def __len__(self) -> int:
        return self._reader.num_records()

    def _check_length(self, info: Any) -> None:
        """A file that was cut short has fewer records, or none, and no other sign of it."""
        lengths = [
            length
            for split in info.splits.values()
            for name, length in zip(split.filenames, split.shard_lengths, strict=True)
            if name == self.path.name
        ]
        if lengths != [len(self)]:
            listed = f"{INFO} says {lengths[0]}" if lengths else f"{INFO} does not list it"
            raise refusal(self.path.name, f"has {len(self)} records, and {listed}", REMEDY)

    def examples(self, indices: list[int]) -> list[Any]:
        """The fields of these records, by name: protocol buffers."""
        from tensorflow_datasets.proto import tf_example_pb2

        parse = tf_example_pb2.Example.FromString  # type: ignore[attr-defined]
        with self._lock:
            reader = self._reader
        return [parse(each).features.feature for each in reader.read(indices)]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each record as plain values, with a `Stored` in place of images. Empty texts are None, for there
        is no null in these files. Raises InputError for fields of kinds that are not read."""
        info = opened(self.path.parent)
        self._check_length(info)
        features, also = info.features, (info.metadata or {}).get(FIELDS)
        fields = {name: _taking(feature, name, self) for name, feature in features.items()}
        for first in range(0, len(self), TOGETHER):
            indices = list(range(first, min(first + TOGETHER, len(self))))
            for index, example in zip(indices, self.examples(indices), strict=True):
                row = {name: take(example, index) for name, take in fields.items()}
                if also is not None:
                    row |= parse_json(row.pop(also) or "{}")
                yield row


@dataclass(frozen=True, slots=True)
class Stored(StoredBytes):
    """The bytes of an image: the value numbered `place` of a field of a record."""

    file: ArrayRecords
    record: int
    field: str
    place: int = 0

    def read(self) -> bytes:
        (example,) = self.file.examples([self.record])
        return example[self.field].bytes_list.value[self.place]


Take = Callable[[Any, int], Any]  # a field of an example, given with its number


def _taking(feature: Any, name: str, file: ArrayRecords) -> Take:
    """What gives a field's value; of a sequence of objects, a list of these."""
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.FeaturesDict):
        inside = {key: _taking(each, f"{name}/{key}", file) for key, each in feature.items()}
        return lambda example, record: {key: take(example, record) for key, take in inside.items()}
    if not isinstance(feature, kinds.Sequence):
        take = _listing(feature, name, file)
        return lambda example, record: next(iter(take(example, record)), None)
    if not isinstance(feature.feature, kinds.FeaturesDict):
        return _listing(feature.feature, name, file)
    columns = {key: _listing(each, f"{name}/{key}", file) for key, each in feature.feature.items()}

    def objects(example: Any, record: int) -> list[dict[str, Any]]:
        values = [take(example, record) for take in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    return objects


def _listing(feature: Any, name: str, file: ArrayRecords) -> Take:
    """What gives the values of a field that is no object."""
    from tensorflow_datasets import features as kinds

    if isinstance(feature, kinds.Image):
        return lambda example, record: [
            Stored(file, record, name, place) for place in range(len(example[name].bytes_list.value))
        ]
    if isinstance(feature, kinds.Text):
        return lambda example, record: [text.decode() or None for text in example[name].bytes_list.value]
    if not isinstance(feature, kinds.Tensor) or feature.shape:
        known = "texts, images, numbers, sequences and objects of these"
        problem = f"is a {type(feature).__name__} feature"
        raise refusal(f"{file.path.parent.name} field {name}", problem, f"build it with {known}")

    def numbers(example: Any, record: int) -> list[Any]:
        kind = example[name].WhichOneof("kind")
        values = getattr(example[name], kind).value if kind else ()
        return [value.decode() if isinstance(value, bytes) else value for value in values]

    return numbers
