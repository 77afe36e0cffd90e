"""Prefixes and forks of the goldens, and what the decoder says where every token is given."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial, reduce
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Goldens
from runs import one_device

from mllm_align.batch import Group, HostPrefix, padded
from mllm_align.config import SamplingConfig
from mllm_align.generation.decode import Fork, Generator, Row, Shape, forks_of
from mllm_align.generation.sampling import BLOCK, filtered, random_key, uniform
from mllm_align.models.bundle import Bundle
from mllm_align.models.vlm import VisionLanguageModel
from mllm_align.sharding import traced_within

GREEDY = SamplingConfig(temperature=0.0)
CLOSE = 1e-4  # nats: the most by which logits of two ways to the same number may differ
ROUNDING = 1e-6  # of a sum of probabilities: what such logits move it by, most of them far less apart


def golden_bundle(golden: Goldens, tag: str = "policy", mesh: Any = None) -> Bundle:
    mesh = mesh or one_device()
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(getattr(golden, tag), where)
    return Bundle(golden.folder, None, mesh, jnp.dtype("float32"), params)


def fork(at: int, forced: Any, limit: int, record: str = "r", sample: int = 0, seed: int = 0) -> Fork:
    return Fork(at, np.asarray(forced, np.int32), limit, random_key(seed, record, sample))


def row(features: np.ndarray, group: Group, tokens: Any, *forks: Fork) -> Row:
    """The group's prompt, its text replaced by `tokens`, which may go on after it."""
    tokens = np.asarray(tokens, np.int32)
    own, count = group.prefix, len(tokens)
    fitted = {
        name: padded(array[..., :count], count, fill, axis=-1)
        for name, fill in (("image", -1), ("taps", 0), ("mix", 0))
        if (array := getattr(own, name)) is not None
    }
    prefix = HostPrefix.causal(tokens, **fitted)
    after = np.arange(1, 1 + max(count - len(own.tokens), 0), dtype=np.int32)
    order, rope = (np.concatenate([x[..., :count], x[..., -1:] + after], -1) for x in (own.order, own.rope))
    return Row(features, replace(prefix, order=order, rope=rope), forks)


def at_end(row: Row) -> list[Row]:
    """The naive way: each fork's own prefix alone, up to its last given token, and a fork there.

    Padded to the row's own size and as often as it has forks: a shape that is compiled already.
    """
    rows, prefix = [], row.prefix
    for each in row.forks:
        own = np.concatenate([prefix.tokens[: each.at], each.forced])
        real = np.arange(len(prefix.tokens)) < len(own)
        before = np.arange(len(real)) < each.at
        tokens = np.where(real, np.resize(own, len(real)), 0).astype(np.int32)
        image, visible = np.where(before, prefix.image, -1), np.where(before, prefix.visible, real)
        last = replace(each, at=len(own) - 1, forced=each.forced[-1:])
        alone = replace(prefix, tokens=tokens, image=image, visible=visible)
        rows.append(Row(row.features, alone, (last,) * len(row.forks)))
    return rows


@cache
def _steps(config: Any, mesh: Any) -> Any:
    model = VisionLanguageModel(config)

    def steps(variables, prefix, forks):
        tokens = forks.tokens
        _, count, length = tokens.shape

        def step(own, at):
            now = jax.lax.dynamic_index_in_dim(tokens, at, axis=2, keepdims=False)
            where = forks.order, forks.rope, jnp.full(len(now), at), at
            logits, own = model.apply(variables, now, prefix, own, *where, method="decode")
            return own, logits

        return jax.lax.scan(step, prefix.empty(count, length), jnp.arange(length))[1]

    return jax.jit(traced_within(mesh, steps))


def logits(
    decoder: Generator, bundle: Bundle, rows: list[Row], tokens: list[Any]
) -> list[list[np.ndarray]]:
    """[n, V] float32 after each token of every fork: its forced ones, then `tokens`, but the last."""
    given = [
        replace(
            row,
            forks=tuple(
                replace(fork, forced=np.concatenate([fork.forced, more]), limit=0)
                for fork, more in zip(row.forks, each, strict=True)
            ),
        )
        for row, each in zip(rows, tokens, strict=True)
    ]
    filled = given + [replace(given[0], forks=())] * (decoder.size - len(given))
    forks = forks_of(filled, reduce(Shape.union, (row.shape for row in given)))
    variables = {"params": bundle.params}
    steps = _steps(bundle.config, bundle.mesh)
    out = np.asarray(steps(variables, decoder.prefill(filled), forks))
    return [
        [out[: len(fork.forced) - 1, b, f] for f, fork in enumerate(row.forks)]
        for b, row in enumerate(given)
    ]


def margin(logits: np.ndarray, key: np.ndarray, sampling: SamplingConfig) -> float:
    """How far the draws after each of [n, V] logits stayed from the sums they were put against.

    The least, in float64, as a share of all that was to choose from: rounding that moves no sum by so much
    moves no draw.
    """
    scores = np.asarray(filtered(jnp.asarray(logits), sampling), np.float64)
    mass = np.exp(scores - scores.max(-1, keepdims=True))
    blocks = np.pad(mass, ((0, 0), (0, -mass.shape[1] % BLOCK))).reshape(len(mass), -1, BLOCK)
    return min(_room(row, np.asarray(uniform(key, at))) for at, row in enumerate(blocks))


def _room(blocks: np.ndarray, numbers: np.ndarray) -> float:
    upto = blocks.sum(-1).cumsum()
    block = (upto <= numbers[0] * upto[-1]).sum()
    within = blocks[block].cumsum()
    gaps = [
        np.abs(sums[:-1] / sums[-1] - number) for sums, number in zip((upto, within), numbers, strict=True)
    ]
    return float(np.concatenate(gaps).min())


class Scripted:
    """Stands for a Generator where a test is not about the model: each fork gets random tokens by its key.

    seen: the rows of every call. pictures: what `features` was given. say: None, or the tokens of a fork.
    """

    def __init__(self, vocab: int, size: int = 4, say: Any = None):
        self.vocab, self.size, self.say = vocab, size, say
        self.seen: list[list[Row]] = []
        self.pictures: list[np.ndarray] = []

    def features(self, pictures: list[np.ndarray]) -> list[np.ndarray]:
        self.pictures += pictures
        return [np.zeros((16 * len(pixels.patches), 1), np.float32) for pixels in pictures]

    def __call__(self, rows: list[Row], stop_mask: np.ndarray) -> list[list[np.ndarray]]:
        assert len(rows) <= self.size
        ended = self.stream(partial(next, iter(rows), None), stop_mask)
        return [tokens for _, tokens in chain.from_iterable(ended)]

    def stream(self, ask: Any, stop_mask: np.ndarray) -> Any:
        """As many rows at a time as there is room for; all of them end together."""
        number = 0
        while rows := [row for _ in range(self.size) if (row := ask()) is not None]:
            self.seen.append(rows)
            made = [[self._tokens(fork, stop_mask) for fork in row.forks] for row in rows]
            yield list(enumerate(made, number))
            number += len(rows)

    def _tokens(self, fork: Fork, stop_mask: np.ndarray) -> np.ndarray:
        tokens = np.random.default_rng(fork.key).integers(5, self.vocab, fork.limit)
        tokens = tokens if self.say is None else np.asarray(self.say(fork))
        ends = np.flatnonzero(stop_mask[tokens])
        return tokens[: ends[0] + 1] if len(ends) else tokens
