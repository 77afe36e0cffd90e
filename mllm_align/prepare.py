"""Encoded records from a checkpoint and a data file: the first stage of every command that reads data."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from mllm_align import processes
from mllm_align.batch import Pixels
from mllm_align.config import DataConfig
from mllm_align.config.checks import MANY, check_number
from mllm_align.data.encode import Draw, Encoded, Encoder
from mllm_align.data.mixture import Mixture
from mllm_align.data.readers import records_from, told
from mllm_align.data.records import Record
from mllm_align.data.table import LeftOut, encode_all
from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle
from mllm_align.models.huggingface import Folder
from mllm_align.models.processor import end_tokens
from mllm_align.progress import progress_bar


def make_encoder(bundle: Bundle, data: DataConfig) -> Encoder:
    """The encoder of a bundle's checkpoint."""
    c, template = bundle.config, None
    if data.chat_template is not None:
        try:
            template = data.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat template {data.chat_template} can't be read: {error}") from error
    layout = bundle.folder.family.layout(c, bundle.processor)
    ends = end_tokens(bundle.folder.path, c.decoder.vocab)
    return Encoder(bundle.processor, layout, c.image_token, ends, template)


def read_data(
    data: Any,
    config: DataConfig,
    responses: int,
    dropped: Counter[str] | None = None,
    unpaired: bool = False,
) -> list[Record]:
    """Read and check a data set or rows. Records left out by the rules of a published data set are reported
    on stderr, and counted in `dropped` by reason. Of a `Mixture` the records of all sets, which have its
    names as sources."""
    if isinstance(data, Mixture):
        options = config, responses, dropped, unpaired
        sets = {name: read_data(file, *options) for name, file in data.files.items()}
        return data.joined(sets)
    dropped = Counter() if dropped is None else dropped
    options = {"responses": responses, "dropped": dropped, "unpaired": unpaired}
    records = records_from(data, **config.reading(), **options)
    left_out = told(dropped)
    if left_out and processes.first():
        named = f" of {data}" if isinstance(data, str | os.PathLike) else ""
        print(f"left out{named}: {left_out}", file=sys.stderr, flush=True)
    return records


def name_weights(folder: Folder) -> None:
    """Compute a folder's fingerprints on the first process, which reads all weights, and share them with
    all processes. Must be called on all processes together."""
    names = ("fingerprint", "projector_fingerprint")
    found = processes.on_first(lambda: [getattr(folder, name) for name in names])
    folder.__dict__.update(zip(names, found, strict=True))  # the values of the cached properties


SMALL_BATCH = 256  # a batch size that is always allowed


def check_batch(size: int, records: int) -> None:
    """Refuse a batch size for which most rows would be padding."""
    check_number("batch_size", size, 1, MANY)
    if size > max(SMALL_BATCH, 8 * records):
        raise InputError(
            f"batch_size is {size}, and the data have {records} records: rows without a record would fill "
            "the batch; give a smaller batch_size"
        )


def prepare(
    bundle: Bundle,
    data: Any,
    config: DataConfig,
    responses: int,
    max_new_tokens: int = 0,
    opening: bool = False,
    dropped: Counter[str] | None = None,
    unpaired: bool = False,
    rejected_image: str | None = None,
) -> tuple[Encoder, list[Encoded], list[LeftOut]]:
    """Read, check and encode a data set or rows: (encoder, encoded records, left out).

    max_new_tokens: tokens reserved for a response to be generated. opening: see `Encoder.encode`. dropped:
    counts the records left out by a published data set's own rules. unpaired: see `parse_record`.
    rejected_image: see `encode_all`.
    """
    encoder = make_encoder(bundle, config)
    with _no_collection():
        records = read_data(data, config, responses, dropped, unpaired)
        with progress_bar(len(records), "reading") as bar:
            encoded, left_out = encode_all(
                records,
                encoder,
                responses=responses,
                max_length=config.max_length or bundle.config.decoder.max_length,
                over_long=config.over_long,
                identical=config.identical,
                max_new_tokens=max_new_tokens,
                opening=opening,
                beside=_beside(data),
                tell=bar.update,
                rejected_image=rejected_image,
            )
    return encoder, encoded, left_out


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection: records are long-lived, and scanning them would take a third of the
    time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _beside(data: Any) -> Path | None:
    """The folder of a data file or of a pattern's files; None for rows in memory and cached data sets.
    Of a mixture, that of its first set."""
    if isinstance(data, Mixture):
        return _beside(next(iter(data.weights)))
    if not isinstance(data, str | os.PathLike):
        return None
    path = Path(data)
    if path.is_dir():
        return path
    there = path.is_file() or (has_magic(str(path)) and path.parent.is_dir())
    return path.parent if there else None


def pixels_ahead(
    encoder: Encoder, records: Sequence[Encoded], ahead: int, threads: int = 2, draw: Draw = (0, 0)
) -> Iterator[Pixels]:
    """Each record's pixels, in order, up to `ahead` of them read before they are asked for. draw: see
    `Encoder.pixels`."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(records)
        reading = deque(pool.submit(encoder.pixels, record, draw) for record in islice(waiting, ahead))
        while reading:
            pixels = reading.popleft().result()
            reading.extend(pool.submit(encoder.pixels, record, draw) for record in islice(waiting, 1))
            yield pixels
