"""Batched generation: one prefill per prefix, then any number of continuations (forks) decoded together.

Of more rows than fit a batch, the next begin where others have ended, while the rest goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_align.batch import HostPrefix, Pixels, pad_prefixes, padded
from mllm_align.config import SamplingConfig
from mllm_align.errors import InputError
from mllm_align.generation import slots
from mllm_align.generation.loop import Forks, run
from mllm_align.models.bundle import Bundle, base_shardings, make_model
from mllm_align.models.cache import Cache
from mllm_align.models.config import ModelConfig
from mllm_align.models.policy import SCORE, policy_variables
from mllm_align.sharding import assemble, batch_sharding, batch_shards, replicated, traced_within
from mllm_align.sizes import bucket, round_up, tiles

PARTS = 2
"""Rows begin when one of so many parts of a batch is free: the host and a prefill take time, too."""

Tokens = list[np.ndarray | None]
"""Of each fork of a row: the generated tokens, without the forced ones; a stop token is included. None for
a fork with logits that are not finite."""


@dataclass(frozen=True)
class Fork:
    """One continuation to generate. at: index of the prefix token that its first token replaces. forced: 1
    or more ids; the first may equal that token or differ. limit, key [2] uint32: see `Forks`."""

    at: int
    forced: np.ndarray
    limit: int
    key: np.ndarray


class Shape(NamedTuple):
    """Padded sizes of a batch: forks of a row, tokens of a prefix, tokens of a fork."""

    forks: int
    prefix: int
    tokens: int

    def union(self, other: Shape) -> Shape:
        return Shape(*map(max, self, other))


@dataclass(frozen=True)
class Row:
    """A prefix of p tokens with its continuations, unpadded, on the host.

    features [n, F]: the vision tower's features of the images; row i is embedding 1 + i of the image table.
    """

    features: np.ndarray
    prefix: HostPrefix
    forks: tuple[Fork, ...]

    @property
    def shape(self) -> Shape:
        steps = max((len(fork.forced) + fork.limit - 1 for fork in self.forks), default=0)
        return Shape(bucket(len(self.forks), 1), bucket(len(self.prefix.tokens), 32), bucket(steps) + 1)


class Programs(NamedTuple):
    """Jitted programs of generation. What the host reads is replicated; `held` and `state` are donated.

    features(params, trained, pixels), prefill(params, trained, features, prefix, holes): see the model.
    vacant(prefix, forks, rows, length), insert(held, prefix, forks, slots): see `slots`.
    decode(params, trained, prefix, state, stop_mask, enough): the state when at most `enough` rows are
    unfinished, and its (tokens, lengths, finite, unfinished).
    """

    features: Any
    prefill: Any
    vacant: Any
    insert: Any
    decode: Any


@lru_cache(maxsize=16)
def programs(
    config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any, sampling: SamplingConfig
) -> Programs:
    """Made once per model config. Shardings are fixed: rows and heads are sharded like the model."""
    model = make_model(config)
    weights = base_shardings(config, mesh), None  # None: trained parameters keep their sharding
    rows, on_all = batch_sharding(mesh, micro=False), replicated(mesh)
    held = cache, state = slots.shardings(config, mesh)

    def policy(params: Any, trained: Any) -> Any:
        return policy_variables(params, trained, lora_scale, dtype)

    def features(params, trained, pixels):
        return model.apply(policy(params, trained), pixels.astype(dtype), method="features")

    def prefill(params, trained, features, prefix, holes):
        return model.apply(policy(params, trained), features, prefix, holes, method="prefill")

    def vacant(prefix, forks, rows, length):
        return slots.vacant(config, prefix, forks, rows, length)

    def insert(held, prefix, forks, places):
        return slots.inserted(config, held, prefix, forks, places)

    def decode(params, trained, prefix, state, stop_mask, enough):
        state = run(model, policy(params, trained), prefix, state, stop_mask, sampling, enough)
        return state, (state.tokens, state.lengths, state.finite, state.unfinished)

    def jitted(f, args: tuple, out: Any, **options: Any) -> Any:
        options |= {"compiler_options": compiler_options(mesh)}
        return jax.jit(traced_within(mesh, f, dtype), in_shardings=args, out_shardings=out, **options)

    return Programs(
        jitted(features, (*weights, rows), on_all),
        jitted(prefill, (*weights, rows, rows), cache, static_argnums=4),
        jitted(vacant, (cache, rows), held, static_argnums=(2, 3)),
        jitted(insert, (held, cache, rows, rows), held, donate_argnums=0),
        jitted(decode, (*weights, cache, state, on_all, on_all), (state, on_all), donate_argnums=3),
    )


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Of the programs that decode. On NVIDIA GPUs cuBLAS reads each layer's weights and cache where they
    are stacked; XLA's own (Triton) products copy them at every token, which takes longer than the rest."""
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return {"xla_gpu_enable_triton_gemm": False} if gpu else {}


def part_of(size: int, shards: int) -> int:
    """Rows of a batch of `size` that begin together, as many on each shard."""
    return round_up(-(-size // PARTS), shards)


class Generator:
    """Generation with a bundle's model, `size` prefixes at a time (rounded up to a multiple of the shards).

    trained: parameters that a run trains on top of the checkpoint; they may be replaced between calls.
    """

    def __init__(self, bundle: Bundle, sampling: SamplingConfig, size: int = 8):
        if SCORE in bundle.trained:
            name = bundle.folder.named or bundle.folder.path
            raise InputError(f"{name} is a reward model, which does not answer; name one that does")
        self.shards = batch_shards(bundle.mesh)
        self.size = round_up(size, self.shards)
        self.part = part_of(self.size, self.shards)
        self.vocab = bundle.config.decoder.vocab
        self._params, self.trained = bundle.params, bundle.trained
        rule = replace(sampling, max_tokens=1)  # forks have their own limits
        self.programs = programs(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype, rule)
        self.put = partial(assemble, where=batch_sharding(bundle.mesh, micro=False))
        self.put_on_all = partial(assemble, where=replicated(bundle.mesh))
        self._per_tile = bundle.config.vision.tokens

    @property
    def weights(self) -> tuple[Any, Any]:
        return self._params, self.trained

    def features(self, pictures: Sequence[Pixels]) -> list[np.ndarray]:
        """The tower's output for each record's t tiles: [t * I, F], in the model's dtype."""
        out: list[np.ndarray] = []
        for start in range(0, len(pictures), self.size):
            part = pictures[start : start + self.size]
            counts = [len(pixels.patches) for pixels in part]
            filled = [*part, *[Pixels(*(x[:0] for x in part[0]))] * (self.size - len(part))]
            most = tiles(max(counts), self._per_tile)
            patches = np.stack([padded(pixels.patches, most) for pixels in filled])
            place = np.stack([padded(pixels.place, most, -1) for pixels in filled])
            seen = np.asarray(self.programs.features(*self.weights, self.put(Pixels(patches, place))))
            out += [row[: count * self._per_tile] for row, count in zip(seen, counts, strict=False)]
        return out

    def prefill(self, rows: Sequence[Row]) -> Cache:
        """Keys and values of the rows' prefixes; their number is a multiple of the shards."""
        length = max(row.shape.prefix for row in rows)
        count = bucket(max(len(row.features) for row in rows), 1)
        features = np.stack([padded(row.features, count) for row in rows])
        holes = not all(row.prefix.visible.all() for row in rows)
        given = self.put((features, pad_prefixes([row.prefix for row in rows], length)))
        return self.programs.prefill(*self.weights, *given, holes)

    def __call__(self, rows: Sequence[Row], stop_mask: np.ndarray) -> list[Tokens]:
        """Prefill and decode any number of rows. stop_mask [V] bool: the ids that end a continuation."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].shape)
        out: list[Tokens] = [[] for _ in rows]
        ask = partial(next, (rows[i] for i in order), None)
        for ended in self.stream(ask, stop_mask):
            for number, tokens in ended:
                out[order[number]] = tokens
        return out

    def stream(
        self, ask: Callable[[], Row | None], stop_mask: np.ndarray
    ) -> Iterator[list[tuple[int, Tokens]]]:
        """Numbers and tokens of rows that have ended, those of one time together.

        ask: gives the next row, or None where there is none at the time; it is called up to `size` rows
        ahead, and again when rows have ended. Rows are numbered in its order. That is the order of
        `Row.shape`, if possible: a batch has the shape that its first `size` rows need, and a row that does
        not fit waits for the end of the batch.
        """
        waiting, shape = _Waiting(ask, self.size), Shape(1, 1, 1)
        while waiting.filled():
            longest = Shape(1, 1, shape.tokens)  # never shorter again: rows are hardly sorted by it
            shape = reduce(Shape.union, (row.shape for _, row in waiting), longest)
            batch = _Batch(self, shape, stop_mask)
            while batch.add(waiting) or batch.taken:
                more = bool(waiting) and batch.fits(waiting[0][1])
                yield list(batch.ended(self.size - self.part if more else 0))


class _Waiting(deque[tuple[int, Row]]):
    """Numbered rows that have not begun."""

    def __init__(self, ask: Callable[[], Row | None], size: int):
        super().__init__()
        self._ask, self._size, self._numbers = ask, size, count()

    def filled(self) -> bool:
        """Ask for rows up to the size; whether there are any."""
        while len(self) < self._size and (row := self._ask()) is not None:
            self.append((next(self._numbers), row))
        return bool(self)


class _Batch:
    """Rows on the devices, padded to one shape. Each has a slot, and each shard as many slots."""

    def __init__(self, generator: Generator, shape: Shape, stop_mask: np.ndarray):
        self.generator, self.shape = generator, shape
        self.stop_mask = generator.put_on_all(stop_mask)
        self.slots: list[tuple[int, Row] | None] = [None] * generator.size
        self.held: Any = None

    @property
    def taken(self) -> int:
        return len(self.slots) - self.slots.count(None)

    def fits(self, row: Row) -> bool:
        return self.shape.union(row.shape) == self.shape

    def add(self, waiting: _Waiting) -> bool:
        """Begin the next rows wherever there is room for a whole part; whether any has begun."""
        g, begun = self.generator, False
        while waiting.filled() and self.fits(waiting[0][1]) and g.size - self.taken >= g.part:
            self._add_part(waiting)
            begun = True
        return begun

    def _add_part(self, waiting: _Waiting) -> None:
        g = self.generator
        slots, room = g.size // g.shards, g.part // g.shards  # of a shard
        rows: list[Row] = [replace(waiting[0][1], forks=())] * g.part
        places = np.full(g.part, slots, np.int32)
        for shard in range(g.shards):
            first = shard * slots
            free = [slot for slot in range(slots) if self.slots[first + slot] is None]
            for at, slot in enumerate(free[:room], shard * room):
                if waiting and self.fits(waiting[0][1]):
                    self.slots[first + slot] = each = waiting.popleft()
                    rows[at], places[at] = each[1], slot
        cache, forks = g.prefill(rows), g.put(forks_of(rows, self.shape))
        if self.held is None:
            self.held = g.programs.vacant(cache, forks, g.size, self.shape.prefix)
        self.held = g.programs.insert(self.held, cache, forks, g.put(places))

    def ended(self, enough: int) -> Iterator[tuple[int, Tokens]]:
        """Decode until at most `enough` rows are unfinished; the others leave."""
        g, (prefix, state) = self.generator, self.held
        arrays = self.stop_mask, g.put_on_all(np.int32(enough))
        state, told = g.programs.decode(*g.weights, prefix, state, *arrays)
        self.held = prefix, state
        tokens, lengths, finite, unfinished = map(np.asarray, told)
        for slot, filled in enumerate(self.slots):
            if filled is None or unfinished[slot].any():
                continue
            number, row = filled
            self.slots[slot] = None
            yield (
                number,
                [
                    tokens[slot, f, len(fork.forced) : lengths[slot, f]] if finite[slot, f] else None
                    for f, fork in enumerate(row.forks)
                ],
            )


def forks_of(rows: Sequence[Row], shape: Shape) -> Forks:
    """Forks of all rows, padded with forks that generate nothing."""
    sizes = len(rows), shape.forks
    order, rope, limit = (np.zeros(sizes, np.int32) for _ in range(3))
    forced = np.ones(sizes, np.int32)
    tokens = np.zeros((*sizes, shape.tokens), np.int32)
    keys = np.zeros((*sizes, 2), np.uint32)
    for b, row in enumerate(rows):
        for f, fork in enumerate(row.forks):
            order[b, f], rope[b, f] = row.prefix.order[fork.at], row.prefix.rope[0, fork.at]
            forced[b, f], limit[b, f] = len(fork.forced), fork.limit
            tokens[b, f, : len(fork.forced)], keys[b, f] = fork.forced, fork.key
    return Forks(order, rope, tokens, forced, limit, keys)  # type: ignore[arg-type]
