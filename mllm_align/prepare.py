"""From a checkpoint and a data file to encoded records: what every verb that reads data begins with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from mllm_align import processes
from mllm_align.config import DataConfig
from mllm_align.config.checks import MANY, check_number
from mllm_align.data.anyres import ImageLayout
from mllm_align.data.encode import Encoded, Encoder, encode_all
from mllm_align.data.readers import records_from
from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle, end_tokens
from mllm_align.models.huggingface import Folder
from mllm_align.progress import progress


def make_encoder(bundle: Bundle, data: DataConfig) -> Encoder:
    """The encoder of a bundle's checkpoint."""
    c, template = bundle.config, None
    if data.chat_template is not None:
        try:
            template = data.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat template {data.chat_template} can't be read: {error}") from error
    layout = ImageLayout(c.vision.image_size, c.vision.side, c.vision.tokens, c.pinpoints)
    return Encoder(bundle.processor, layout, c.image_token, end_tokens(bundle.folder), template)


def name_weights(folder: Folder) -> None:
    """Know a folder's fingerprints on every process: its weights are read whole, by the first one alone.
    Call it on all of them together."""
    names = ("fingerprint", "projector_fingerprint")
    found = processes.on_first(lambda: [getattr(folder, name) for name in names])
    folder.__dict__.update(zip(names, found, strict=True))  # where cached_property keeps them


SMALL_BATCH = 256  # rows that are no trouble, however few the records


def check_batch(size: int, records: int) -> None:
    """Refuse a batch of mostly fillers: it takes memory and time for nothing."""
    check_number("batch_size", size, 1, MANY)
    if size > max(SMALL_BATCH, 8 * records):
        raise InputError(
            f"batch_size is {size}, and the data have {records} records: rows without a record would fill "
            "the batch; give a smaller batch_size"
        )


def prepare(
    bundle: Bundle, data: Any, config: DataConfig, responses: int, room: int = 0
) -> tuple[Encoder, list[Encoded], list[str]]:
    """Read, check and encode a data file or rows: (encoder, records, ids left out as over-long).

    room: tokens that a response still to be made may take.
    """
    encoder = make_encoder(bundle, config)
    records = records_from(
        data,
        format=config.format,
        image_root=config.image_root,
        allow_outside=config.allow_outside,
        responses=responses,
    )
    encoded, skipped = encode_all(
        records,
        encoder,
        responses=responses,
        max_length=config.max_length or bundle.config.decoder.max_length,
        over_long=config.over_long,
        room=room,
        progress=lambda items: progress(items, "reading"),
    )
    return encoder, encoded, skipped


def tiles_ahead(
    encoder: Encoder, records: Sequence[Encoded], ahead: int, threads: int = 2
) -> Iterator[np.ndarray]:
    """Each record's tiles [t, h, w, 3], in order, up to `ahead` of them read before they are asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(records)
        reading = deque(pool.submit(encoder.tiles, record) for record in islice(waiting, ahead))
        while reading:
            tiles = reading.popleft().result()
            reading.extend(pool.submit(encoder.tiles, record) for record in islice(waiting, 1))
            yield tiles
