"""Rows that come and go in a batch on the devices: its prefixes and the state of its forks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mllm_align.generation.loop import Forks, State, begin
from mllm_align.models.cache import Cache
from mllm_align.models.config import ModelConfig
from mllm_align.sharding import batch_shards, per_shard, sharding_of

Held = tuple[Cache, State]


def axes(config: ModelConfig) -> Any:
    """Logical axes of every array of a `Held`, as tuples of names."""
    kept, own = ("rows", "kv_heads", "prefix", None), (None, "rows", "forks", "kv_heads", None, None)
    row, fork = ("rows", "prefix"), ("rows", "forks")
    layers: Any = ((None, *kept),) * 2 if config.decoder.layers > 1 else None
    place: Any = None if config.decoder.local is None else row
    cache = Cache(layers, (kept, kept), row, row, place)  # type: ignore[arg-type]
    state: Any = {
        **dict.fromkeys(("order", "rope", "forced", "limit", "lengths", "unfinished", "finite"), fork),
        "tokens": (*fork, None),
        "uniforms": (*fork, None, None),
        "step": ("rows",),
        "logps": None,
        "own": (own, own),
        "column": (),
    }
    return cache, State(**state)


def shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """Of a `Held`: rows and, where they divide, key-value heads are cut."""
    sizes = {"rows": batch_shards(mesh), "kv_heads": config.decoder.kv_heads}
    return _each(
        lambda names: sharding_of(mesh, names, [sizes.get(name, 1) for name in names]), axes(config)
    )


def vacant(config: ModelConfig, prefix: Cache, forks: Forks, rows: int, length: int) -> Held:
    """A batch of `rows` rows without forks, prefixes of `length` tokens, all else as in these."""
    sizes = {"rows": rows, "prefix": length}

    def zeros(names: tuple, x: Array) -> Array:
        shape = [sizes.get(name, size) for name, size in zip(names, x.shape, strict=True)]
        return jnp.zeros(shape, x.dtype)

    return _each(zeros, axes(config), (prefix, begin(prefix, forks)))


def inserted(config: ModelConfig, held: Held, prefix: Cache, forks: Forks, slots: Int[Array, " n"]) -> Held:
    """The batch with n rows in other rows' places. slots: these, counted on each device from 0 on; for a
    row that only pads, one that is too large.

    No prefix may be longer than the batch's. A new row's keys and values are set too, for zero weights do
    not hide what is not finite.
    """

    def insert(names: tuple, old: Array, new: Array) -> Array:
        if "rows" not in names:
            return old
        more = [old.shape[i] - new.shape[i] if name == "prefix" else 0 for i, name in enumerate(names)]
        new = jnp.pad(new, [(0, count) for count in more])
        lead = (slice(None),) * names.index("rows")

        def put(old: Array, new: Array, slots: Array) -> Array:
            return old.at[(*lead, slots)].set(new, mode="drop")

        return per_shard(put, (names, names, ("rows",)))(old, new, slots)

    return _each(insert, axes(config), held, (prefix, begin(prefix, forks)))


def _each(f: Any, named: Any, *held: Any) -> Any:
    return jax.tree.map(f, named, *held, is_leaf=_is_names)


def _is_names(x: Any) -> bool:
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
