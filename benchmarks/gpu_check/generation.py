"""The tower, BDHS and rollouts of LLaVA-1.6-7B's shape: tiles and tokens per second."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_check import model as shapes
from gpu_check.lines import Figures, Lines
from gpu_check.model import Held
from mllm_align.batch import HostPrefix
from mllm_align.config import BDHSConfig, SamplingConfig
from mllm_align.generation.decode import Fork, Generator, Row, programs
from mllm_align.generation.distortion import gathered, visible_embeddings
from mllm_align.generation.rollout import rollout_program
from mllm_align.models.bundle import Bundle
from mllm_align.sharding import batch_sharding, replicated
from mllm_align.training.flops import vision_flops

FORCED = 12  # tokens between a sentence's start and its cut


def run(lines: Lines, work: Path, tiny: bool) -> None:
    chosen, held = shapes.sizes(tiny), []
    least = 0 if tiny else 15
    if not lines("weights", lambda: shapes.weights(held, chosen)):
        return
    lines("tower", lambda: tower(held[0]), needs=least)
    lines("BDHS", lambda: bdhs(held[0]), needs=least)
    for count in chosen.samples:
        item = f"rollout, {count} samples of {chosen.response} tokens"
        lines(item, lambda n=count: rollout(held[0], n), needs=least)


def tower(held: Held) -> Figures:
    """All tiles of a BDHS batch at once, with the pixels already on the device."""
    before, s, v = shapes.memory(), held.sizes, held.model.vision
    see = programs(held.model, held.mesh, 1.0, held.dtype, SamplingConfig(max_tokens=1)).features
    each, _ = shapes.picture(held.model)
    where = batch_sharding(held.mesh, micro=False)
    pixels = jax.device_put(shapes.noise(held.model, np.random.default_rng(0), s.records, each), where)
    began = time.perf_counter()
    jax.block_until_ready(see(held.params, {}, pixels))
    first = time.perf_counter() - began
    taken = shapes.spread(shapes.seconds(lambda: see(held.params, {}, pixels), s.times))
    count, peak = s.records * each, shapes.peak()
    flops = vision_flops(held.model, count) / taken["median"]
    return {
        "tiles": count,
        "pass_s": taken,
        "tiles_per_s": count / taken["median"],
        "tokens_per_s": count * v.tokens / taken["median"],
        "mfu": None if peak is None else flops / peak,
        "first_pass_s": first,
        **shapes.memory(before),
    }


def bdhs(held: Held) -> Figures:
    """One BDHS iteration of a batch of records, including the host's part: masked embeddings are
    removed."""
    before, s, rng = shapes.memory(), held.sizes, np.random.default_rng(0)
    folder: Any = SimpleNamespace(config=held.model)
    bundle = Bundle(folder, None, held.mesh, held.dtype, held.params)
    generator = Generator(bundle, SamplingConfig(), s.records)
    each, _ = shapes.picture(held.model)
    pixels = [shapes.noise(held.model, rng, each) for _ in range(s.records)]
    stop_mask = np.zeros(held.model.decoder.vocab, bool)  # every completion takes all its tokens

    def once() -> dict[str, float]:
        began = time.perf_counter()
        features = generator.features(pixels)
        seen = time.perf_counter()
        rows = [hidden_row(held, of_image, np.random.default_rng(i)) for i, of_image in enumerate(features)]
        ready = time.perf_counter()
        for first in range(0, len(rows), generator.part):
            jax.block_until_ready(generator.prefill(rows[first : first + generator.part]))
        filled = time.perf_counter()
        made = generator(rows, stop_mask)  # which prefills them once more
        done = time.perf_counter() - (filled - ready)
        tokens = sum(len(ids) for row in made for ids in row)
        if tokens != s.records * s.sentences * s.cut:
            raise RuntimeError(f"{tokens} tokens were made")
        return {
            "features_s": seen - began,
            "prefill_s": filled - ready,
            "decode_s": done - filled,
            "whole_s": done - began,
            "prefix_tokens": sum(len(row.prefix.tokens) for row in rows),
            "tokens": tokens,
        }

    first = once()
    passes = [once() for _ in range(max(s.times // 2, 1))]
    found = min(passes, key=lambda x: x["whole_s"])
    return {
        "records": s.records,
        "sentences": s.records * s.sentences,
        **found,
        "tiles_per_s": s.records * each / found["features_s"],
        "prefill_tokens_per_s": found["prefix_tokens"] / found["prefill_s"],
        "decode_tokens_per_s": found["tokens"] / found["decode_s"],
        "tokens_per_s": found["tokens"] / found["whole_s"],
        "first_pass_s": first["whole_s"],
        **shapes.memory(before),
    }


def hidden_row(held: Held, features: np.ndarray, rng: np.random.Generator) -> Row:
    """A prompt with its chosen response, most of the image hidden, and a fork in every sentence."""
    s = held.sizes
    _, tokens, image = shapes.prompt(held.model, s.prefix, rng)
    chosen = rng.integers(0, held.model.image_token, s.chosen, np.int32)
    tokens = np.concatenate([tokens, chosen])
    image = np.concatenate([image, np.full(s.chosen, -1, np.int32)])
    visible = visible_embeddings(image, BDHSConfig().mask_rate, rng)
    forced = min(FORCED, s.chosen // s.sentences)
    forks = tuple(
        Fork(start, tokens[start : start + forced], s.cut, rng.integers(0, 2**32, 2, np.uint32))
        for start in s.prefix - 1 + np.arange(s.sentences) * (s.chosen // s.sentences)
    )
    prefix = replace(HostPrefix.causal(tokens, image), visible=visible)
    return gathered(Row(features, prefix, forks))


def rollout(held: Held, count: int) -> Figures:
    """Samples for every prompt, with the rollout program of online training."""
    before, s = shapes.memory(), held.sizes
    began = time.perf_counter()
    compiled, args = rollout_call(held, count, s.response)
    compiling = time.perf_counter() - began
    made = compiled(*args)
    if not (np.asarray(made.lengths) == s.response).all():
        raise RuntimeError("a sample ended before its last token")
    if not np.isfinite(np.asarray(made.logps)).all():
        raise RuntimeError("a log-prob is not finite")
    taken = shapes.spread(shapes.seconds(lambda: compiled(*args).lengths, max(s.times // 2, 1)))
    tokens = s.prompts * count * s.response
    return {
        "prompts": s.prompts,
        "samples": count,
        "pass_s": taken,
        "tokens_per_s": tokens / taken["median"],
        "token_step_s": taken["median"] / s.response,
        "trace_and_compile_s": compiling,
        "planned_bytes": shapes.planned_bytes(compiled),
        **shapes.memory(before),
    }


def rollout_call(held: Held, count: int, tokens: int) -> tuple[Any, tuple]:
    """The compiled rollout of `count` samples of so many tokens for every prompt, and its arguments."""
    program = rollout_program(held.model, held.mesh, 1.0, held.dtype, SamplingConfig(max_tokens=tokens))
    prompts, rng = shapes.batch(held, held.sizes.prompts), np.random.default_rng(0)
    keys = rng.integers(0, 2**32, (1, held.sizes.prompts, count, 2), np.uint32)
    keys = jax.device_put(keys, batch_sharding(held.mesh))
    never = jax.device_put(jnp.zeros(held.model.decoder.vocab, bool), replicated(held.mesh))
    args = held.params, {}, prompts, keys, never
    return program.lower(*args).compile(), args
