"""Batched generation: one prefill per prefix, then any number of continuations (forks) decoded together.

A fork continues a prefix from one of its tokens on: it attends to the prefix before that token, then to its
own tokens. Its first tokens are given (`forced`), at least one: the last token before the fork, which is
run again because the cache stores keys and values but no predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from mllm_align.batch import HostPrefix, Pixels, pad_prefixes, padded
from mllm_align.config import SamplingConfig
from mllm_align.errors import InputError
from mllm_align.generation.sampling import choose, uniform
from mllm_align.models.bundle import Bundle, base_shardings, make_model
from mllm_align.models.cache import Cache
from mllm_align.models.config import ModelConfig
from mllm_align.models.policy import SCORE, policy_variables
from mllm_align.models.vlm import VisionLanguageModel
from mllm_align.sharding import (
    assemble,
    batch_sharding,
    batch_shards,
    replicated,
    sharding_of,
    traced_within,
)
from mllm_align.sizes import bucket, round_up, tiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forks:
    """F continuations of each of B prefixes.

    order, rope: of a fork's first own token, as in `batch.Prefix`; it attends to prefix tokens before it.
    tokens, forced: R positions for its own tokens; the first `forced`, at least 1, are given.
    limit: maximum number of tokens to generate after those; 0 for a fork that only pads the batch.
    keys: key data of its random numbers (see `sampling.random_key`).
    """

    order: Int[Array, "B F"]
    rope: Int[Array, "B F"]
    tokens: Int[Array, "B F R"]
    forced: Int[Array, "B F"]
    limit: Int[Array, "B F"]
    keys: UInt32[Array, "B F 2"]


@dataclass(frozen=True)
class Fork:
    """One continuation to generate. at: index of the prefix token that its first token replaces. forced: 1
    or more ids; the first may equal that token or differ. limit, key [2] uint32: see `Forks`."""

    at: int
    forced: np.ndarray
    limit: int
    key: np.ndarray


@dataclass(frozen=True)
class Row:
    """A prefix of p tokens with its continuations, unpadded, on the host.

    features [n, F]: the vision tower's features of the images; row i is embedding 1 + i of the image table.
    """

    features: np.ndarray
    prefix: HostPrefix
    forks: tuple[Fork, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Padded sizes (forks, prefix), by which rows are batched."""
        return bucket(len(self.forks), 1), bucket(len(self.prefix.tokens), 32)


@lru_cache(maxsize=16)
def programs(
    config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any, sampling: SamplingConfig
) -> tuple:
    """(features, prefill, decode): jitted once per model config. Shardings are fixed: rows and heads of the
    cache are sharded like the model; outputs that the host reads are replicated."""
    model = make_model(config)
    weights = base_shardings(config, mesh), None  # None: trained parameters keep their sharding
    rows, on_all = batch_sharding(mesh, micro=False), replicated(mesh)
    cache = cache_shardings(config, mesh)

    def policy(params: Any, trained: Any) -> Any:
        return policy_variables(params, trained, lora_scale, dtype)

    def features(params, trained, pixels):
        return model.apply(policy(params, trained), pixels.astype(dtype), method="features")

    def prefill(params, trained, features, prefix, holes):
        return model.apply(policy(params, trained), features, prefix, holes, method="prefill")

    def decode(params, trained, prefix, forks, stop_mask):
        tokens, lengths, _, finite = run(model, policy(params, trained), prefix, forks, stop_mask, sampling)
        return tokens, lengths, finite

    def jitted(f, args: tuple, out: Any, static: tuple[int, ...] = ()) -> Any:
        options = {"static_argnums": static, "compiler_options": compiler_options(mesh)}
        shardings = {"in_shardings": (*weights, *args), "out_shardings": out}
        return jax.jit(traced_within(mesh, f, dtype), **shardings, **options)

    return (
        jitted(features, (rows,), on_all),
        jitted(prefill, (rows, rows), cache, static=(4,)),
        jitted(decode, (cache, rows, on_all), on_all),
    )


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Of the programs that decode. On NVIDIA GPUs cuBLAS reads each layer's weights and cache where they
    are stacked; XLA's own (Triton) products copy them at every token, which takes longer than the rest."""
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return {"xla_gpu_enable_triton_gemm": False} if gpu else {}


def cache_shardings(config: ModelConfig, mesh: Mesh) -> Cache:
    """Rows and, where they divide, key-value heads."""
    rows = batch_sharding(mesh, micro=False)
    heads = config.decoder.kv_heads
    last = sharding_of(mesh, ("rows", "kv_heads"), (batch_shards(mesh), heads))
    stacked = sharding_of(mesh, (None, "rows", "kv_heads"), (1, batch_shards(mesh), heads))
    layers = (stacked, stacked) if config.decoder.layers > 1 else None
    place = None if config.decoder.local is None else rows
    return Cache(layers, (last, last), rows, rows, place)  # type: ignore[arg-type]


class Generator:
    """Generation with a bundle's model, `size` prefixes at a time (rounded up to a multiple of the shards).

    trained: parameters that a run trains on top of the checkpoint; they may be replaced between calls.
    """

    def __init__(self, bundle: Bundle, sampling: SamplingConfig, size: int = 8):
        if SCORE in bundle.trained:
            name = bundle.folder.named or bundle.folder.path
            raise InputError(f"{name} is a reward model, which does not answer; name one that does")
        shards = batch_shards(bundle.mesh)
        self.size = round_up(size, shards)
        self.vocab = bundle.config.decoder.vocab
        params, self.trained = bundle.params, bundle.trained
        put = partial(assemble, where=batch_sharding(bundle.mesh, micro=False))
        put_on_all = partial(assemble, where=replicated(bundle.mesh))
        rule = replace(sampling, max_tokens=1)  # forks have their own limits
        see, fill, loop = programs(bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype, rule)
        self._per_tile = bundle.config.vision.tokens
        self._features = lambda pixels: see(params, self.trained, put(pixels))
        self._prefill = lambda features, prefix, holes: fill(
            params, self.trained, put(features), put(prefix), holes
        )
        self._decode = lambda prefix, forks, stop_mask: loop(
            params, self.trained, prefix, put(forks), put_on_all(stop_mask)
        )

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
            seen = np.asarray(self._features(Pixels(patches, place)))
            out += [row[: count * self._per_tile] for row, count in zip(seen, counts, strict=False)]
        return out

    def prefill(self, rows: Sequence[Row]) -> Cache:
        """Keys and values of up to `size` prefixes."""
        length = max(row.shape[1] for row in rows)
        count = bucket(max(len(row.features) for row in rows), 1)
        rows = [*rows, *[rows[0]] * (self.size - len(rows))]
        features = np.stack([padded(row.features, count) for row in rows])
        holes = not all(row.prefix.visible.all() for row in rows)
        return self._prefill(features, pad_prefixes([row.prefix for row in rows], length), holes)

    def decode(
        self, rows: Sequence[Row], prefix: Cache, stop_mask: np.ndarray
    ) -> list[list[np.ndarray | None]]:
        """Generated tokens of every fork of every row, without the forced ones; a stop token is included.
        None for a fork with logits that are not finite.

        stop_mask [V] bool: the ids that end a continuation.
        """
        forks = _forks(rows, self.size)
        tokens, lengths, finite = (np.asarray(x) for x in self._decode(prefix, forks, stop_mask))
        return [
            [
                tokens[b, f, len(fork.forced) : lengths[b, f]] if finite[b, f] else None
                for f, fork in enumerate(row.forks)
            ]
            for b, row in enumerate(rows)
        ]

    def __call__(self, rows: Sequence[Row], stop_mask: np.ndarray) -> list[list[np.ndarray | None]]:
        """Prefill and decode any number of rows; rows of similar shape share a batch."""
        out: list[list[np.ndarray | None]] = [[] for _ in rows]
        order = sorted(range(len(rows)), key=lambda i: rows[i].shape)
        for start in range(0, len(order), self.size):
            part = order[start : start + self.size]
            batch = [rows[i] for i in part]
            for i, tokens in zip(part, self.decode(batch, self.prefill(batch), stop_mask), strict=True):
                out[i] = tokens
        return out


def _forks(rows: Sequence[Row], size: int) -> Forks:
    """Forks of all rows, padded with forks that generate nothing."""
    shape = size, bucket(max(len(row.forks) for row in rows), 1)
    steps = max((len(fork.forced) + fork.limit - 1 for row in rows for fork in row.forks), default=0)
    order, rope, limit = (np.zeros(shape, np.int32) for _ in range(3))
    forced = np.ones(shape, np.int32)
    tokens = np.zeros((*shape, bucket(steps) + 1), np.int32)
    keys = np.zeros((*shape, 2), np.uint32)
    for b, row in enumerate(rows):
        for f, fork in enumerate(row.forks):
            order[b, f], rope[b, f] = row.prefix.order[fork.at], row.prefix.rope[0, fork.at]
            forced[b, f], limit[b, f] = len(fork.forced), fork.limit
            tokens[b, f, : len(fork.forced)], keys[b, f] = fork.forced, fork.key
    return Forks(order, rope, tokens, forced, limit, keys)  # type: ignore[arg-type]


def run(
    model: VisionLanguageModel,
    variables: Any,
    prefix: Cache,
    forks: Forks,
    stop_mask: Bool[Array, " V"],
    sampling: SamplingConfig,
) -> tuple[Int[Array, "B F R"], Int[Array, "B F"], Float[Array, "B F R"], Bool[Array, "B F"]]:
    """(tokens, lengths, logps, finite) of every fork. tokens: the forced ones, then the generated ones.
    finite: whether all logits from which the tokens were sampled are finite.

    Log-probs are the model's, in nats per token, before temperature and filters; 0 at other positions. A
    fork ends after a generated token in `stop_mask`, at its limit, or at logits that are not finite; the
    loop ends when all forks have.
    """
    batch, count, length = forks.tokens.shape

    def unfinished_forks(state):
        step, *_, unfinished, _, _ = state
        return unfinished.any() & (step < length - 1)

    def advance(state):
        step, tokens, lengths, logps, unfinished, finite, own = state
        now = jax.lax.dynamic_index_in_dim(tokens, step, axis=2, keepdims=False)
        at = forks.order, forks.rope, step
        logits, own = model.apply(variables, now, prefix, own, *at, method="decode")
        number = step + 1 - forks.forced  # index of the next token among the generated ones
        draws = jnp.take_along_axis(uniforms, jnp.maximum(number, 0)[:, :, None, None], axis=2)
        sampled = choose(logits.reshape(batch * count, -1), draws.reshape(-1, 2), sampling)
        sampled = sampled.reshape(batch, count)
        given = jax.lax.dynamic_index_in_dim(tokens, step + 1, axis=2, keepdims=False)
        new = unfinished & (number >= 0)
        chosen = jnp.take_along_axis(logits, sampled[:, :, None], axis=-1)[:, :, 0]
        logp = jnp.where(new, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
        logps = jax.lax.dynamic_update_index_in_dim(logps, logp, step + 1, 2)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, jnp.where(new, sampled, given), step + 1, 2)
        finite &= ~new | jnp.isfinite(logits).all(-1)
        unfinished &= finite & ~(new & (stop_mask[sampled] | (number + 1 >= forks.limit)))
        return step + 1, tokens, lengths + new.astype(lengths.dtype), logps, unfinished, finite, own

    uniforms = uniform(forks.keys[:, :, None], jnp.arange(length)[None, None])  # cheaper all at once
    own = prefix.empty(count, length - 1)  # the last token is never fed to the model
    logps = jnp.zeros(forks.tokens.shape, jnp.float32)
    unfinished, finite = forks.limit > 0, jnp.ones(forks.limit.shape, bool)
    start = (jnp.zeros((), jnp.int32), forks.tokens, forks.forced, logps, unfinished, finite, own)
    _, tokens, lengths, logps, _, finite, _ = jax.lax.while_loop(unfinished_forks, advance, start)
    return tokens, lengths, logps, finite
