"""Plain generation: responses sampled from a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.config import DataConfig, SamplingConfig
from mllm_align.config.checks import MANY, SEED, check_number
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.errors import InputError, not_finite
from mllm_align.files import json_text
from mllm_align.generation.decode import Fork, Generator, Row
from mllm_align.generation.sampling import random_key
from mllm_align.models.bundle import Bundle, opened
from mllm_align.prepare import check_batch, pixels_ahead, prepare
from mllm_align.progress import progress_bar
from mllm_align.result_file import result


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
    write, JSON lines: index, responses (null for a record left out). batch_size: prompts at once. config:
    a DataConfig, how data are read.

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
        texts = _texts(opened(model), data, sampling, samples, seed, batch_size, config)
        if file is not None:
            lines = [{"index": i, "responses": each or None} for i, each in enumerate(texts)]
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
) -> list[list[str]]:
    encoder, records, left_out = prepare(bundle, data, config, responses=0)
    check_batch(batch_size, len(records))
    out: list[list[str]] = [[] for _ in range(len(records) + len(left_out))]
    tokens = respond(Generator(bundle, sampling, batch_size), encoder, records, sampling, samples, seed)
    for record, each in zip(records, tokens, strict=True):
        out[record.index] = [encoder.text(ids).strip() for ids in each]
    return out


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

    what: the progress bar's name; None shows none. done: called with the place and the responses of each
    record whose logits are finite, as soon as they are there. Raises NotFinite, after all records, for
    those whose logits are not finite.
    """
    eos_mask = encoder.eos_mask(generator.vocab)
    order = sorted(range(len(records)), key=lambda i: records[i].shape)
    out: list[list[Any]] = [[] for _ in records]
    pictures = pixels_ahead(encoder, [records[i] for i in order], 2 * generator.size)
    with nullcontext() if what is None else progress_bar(len(records), what) as bar:
        for start in range(0, len(order), generator.size):
            part = order[start : start + generator.size]
            features = generator.features(list(islice(pictures, len(part))))
            rows = [
                prompt_row(encoder, records[i], seen, sampling.max_tokens, samples, seed)
                for i, seen in zip(part, features, strict=True)
            ]
            for i, tokens in zip(part, generator(rows, eos_mask), strict=True):
                out[i] = tokens
                whole = [ids for ids in tokens if ids is not None]
                if done is not None and len(whole) == len(tokens):
                    done(i, whole)
            if bar is not None:
                bar.update(len(part))
    broken = [
        record.record.id
        for record, each in zip(records, out, strict=True)
        if any(ids is None for ids in each)
    ]
    if broken:
        raise not_finite("logits are", broken, len({record.record.id for record in records}))
    return out


def prompt_row(
    encoder: Encoder,
    encoded: Encoded,
    features: np.ndarray,
    limit: int,
    samples: int,
    seed: int,
    *draw: int,
) -> Row:
    """A prompt with `samples` forks at its end. draw: numbers that distinguish this draw from others."""
    prefix = encoder.prefix(encoded)
    last = len(prefix.tokens) - 1
    forks = tuple(
        Fork(last, prefix.tokens[last:], limit, random_key(seed, encoded.record.id, *draw, sample))
        for sample in range(samples)
    )
    return Row(features, prefix, forks)
