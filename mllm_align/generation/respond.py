"""Plain generation: responses sampled from a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.config import DataConfig, SamplingConfig
from mllm_align.config.checks import MANY, SEED, check_number
from mllm_align.data.encode import Encoded, Encoder, common_length
from mllm_align.errors import InputError, not_finite
from mllm_align.files import json_text
from mllm_align.generation.decode import Fork, Generator, Row
from mllm_align.generation.sampling import random_key
from mllm_align.models.bundle import Bundle, opened
from mllm_align.prepare import check_batch, pixels_ahead, prepare
from mllm_align.progress import progress_bar
from mllm_align.result_file import result
from mllm_align.sizes import bucket

FORK_TOKENS = 4096  # of one row: keeps its cache of many questions near that of an image in tiles


def generate(
    model: str | Path | Bundle,
    data: Any,
    sampling: SamplingConfig | None = None,
    *,
    out: str | Path | None = None,
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    config: DataConfig | None = None,
) -> list[list[str]]:
    """`samples` responses to every record's prompt, as text without surrounding white space.

    model: a Bundle, or what `load` takes: a model, or a run's folder. data: a data set in files, or rows
    with `prompt` (or `messages`) and `images`. sampling: a SamplingConfig; greedy if None. out: a file to
    write, JSON lines: index, id, responses (null for a record left out). batch_size: prompts at once.
    config: a DataConfig, how data are read.

    Returns a list of texts for each record, in order; empty for one left out as over-long (only with
    data.over_long "skip"). Raises InputError for unusable data, NotFinite for logits that are not finite.
    """
    sampling, config = sampling or SamplingConfig(temperature=0.0), config or DataConfig()
    for name, value, low, high in (
        ("samples", samples, 1, 1024),
        ("batch_size", batch_size, 1, MANY),
        ("seed", seed, 0, SEED),
    ):
        check_number(name, value, low, high)
    if samples > 1 and sampling.temperature == 0:
        same = f"samples is {samples}, but greedy responses to one prompt are all the same"
        raise InputError(f"{same}; set sampling.temperature, as 1")
    with nullcontext() if out is None else result(Path(out), data) as file:  # refused before the work
        ids, texts = _texts(opened(model), data, sampling, samples, seed, batch_size, config)
        if file is not None:
            named = enumerate(zip(ids, texts, strict=True))
            lines = [{"index": i, "id": id, "responses": each or None} for i, (id, each) in named]
            file.writelines(json_text(line) + "\n" for line in lines)
    return texts


def _texts(
    bundle: Bundle,
    data: Any,
    sampling: SamplingConfig,
    samples: int,
    seed: int,
    batch_size: int,
    config: DataConfig,
) -> tuple[list[str], list[list[str]]]:
    """Of every record its id and the responses, none for one left out."""
    encoder, records, left_out = prepare(bundle, data, config, responses=0)
    check_batch(batch_size, len(records))
    ids = {each.index: each.id for each in left_out} | {each.index: each.record.id for each in records}
    out: list[list[str]] = [[] for _ in ids]
    tokens = respond(Generator(bundle, sampling, batch_size), encoder, records, sampling, samples, seed)
    for record, each in zip(records, tokens, strict=True):
        out[record.index] = [encoder.text(tokens).strip() for tokens in each]
    return [ids[i] for i in range(len(out))], out


def respond(
    generator: Generator,
    encoder: Encoder,
    records: Sequence[Encoded],
    sampling: SamplingConfig,
    samples: int = 1,
    seed: int = 0,
    what: str | None = "generating",
    done: Callable[[int, list[np.ndarray]], None] | None = None,
) -> list[list[np.ndarray]]:
    """Token ids of `samples` responses to each record's prompt, including the end of sequence.

    Prompts about the same images share a row: the tower and the prefill run once for all of them. what: the
    progress bar's name; None shows none. done: called with the place and the responses of each record
    whose logits are finite, as soon as they are there. Raises NotFinite, after all records, for those
    whose logits are not finite.
    """
    eos_mask, limit = encoder.eos_mask(generator.vocab), sampling.max_tokens
    rows = shared_rows(records, encoder.image_token, limit, samples)
    rows.sort(key=lambda row: (bucket(len(row), 1), records[row[0]].shape))
    out: list[list[Any]] = [[] for _ in records]
    pictures = pixels_ahead(encoder, [records[row[0]] for row in rows], 2 * generator.size)

    def made() -> Iterator[Row]:
        for start in range(0, len(rows), generator.size):
            part = rows[start : start + generator.size]
            features = generator.features(list(islice(pictures, len(part))))
            for row, seen in zip(part, features, strict=True):
                yield prompt_row(encoder, [records[i] for i in row], seen, limit, samples, seed)

    with nullcontext() if what is None else progress_bar(len(records), what) as bar:
        ended = generator.stream(partial(next, made(), None), eos_mask)
        for number, tokens in chain.from_iterable(ended):
            row = rows[number]
            for i, of_record in zip(row, range(0, len(tokens), samples), strict=True):
                out[i] = tokens[of_record : of_record + samples]
                whole = [ids for ids in out[i] if ids is not None]
                if done is not None and len(whole) == samples:
                    done(i, whole)
            if bar is not None:
                bar.update(len(row))
    broken = [
        record.record.id
        for record, each in zip(records, out, strict=True)
        if any(ids is None for ids in each)
    ]
    if broken:
        raise not_finite("logits are", broken, len({record.record.id for record in records}))
    return out


def shared_rows(records: Sequence[Encoded], image_token: int, limit: int, samples: int) -> list[list[int]]:
    """Places of the records that go into one row: prompts with the same images and the same tokens up to
    the last of them. A row's forks have at most FORK_TOKENS tokens in all, unless it is of one record."""
    found: dict[Any, list[int]] = {}
    text: dict[int, int] = {}  # tokens after the last image
    for i, record in enumerate(records):
        places = np.flatnonzero(record.prefix == image_token)
        seen = int(places[-1]) + 1 if len(places) else 0
        text[i] = len(record.prefix) - seen
        keys = tuple(image.key for image in record.record.images)
        same = (keys, record.prefix[:seen].tobytes()) if seen and None not in keys else i
        found.setdefault(same, []).append(i)
    rows = []
    for alike in found.values():
        alike.sort(key=text.__getitem__)  # forks of a row run as long as the longest
        most = max(FORK_TOKENS // (samples * (text[alike[-1]] + limit)), 1)
        size = -(-len(alike) // -(-len(alike) // most))  # equal parts
        rows += [alike[start : start + size] for start in range(0, len(alike), size)]
    return rows


def prompt_row(
    encoder: Encoder,
    records: Sequence[Encoded],
    features: np.ndarray,
    limit: int,
    samples: int,
    seed: int,
    *draw: int,
) -> Row:
    """Prompts about the same images, as their common prefix and, for each in turn, `samples` forks that
    begin where the prompts differ. draw: numbers that distinguish this draw from others."""
    first = min((record.prefix for record in records), key=len)
    shared = min(common_length([record.prefix.tolist() for record in records]), len(first) - 1)
    prefix = encoder.prefix(records[0])
    at = len(prefix.tokens) - len(records[0].prefix) + shared
    if len(records) > 1:
        prefix = prefix.keep(np.arange(len(prefix.tokens)) <= at)
    forks = tuple(
        Fork(at, record.prefix[shared:], limit, random_key(seed, record.record.id, *draw, sample))
        for record in records
        for sample in range(samples)
    )
    return Row(features, prefix, forks)
