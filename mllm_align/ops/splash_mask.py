"""Masks of splash attention over prompt groups: rules that kernels evaluate, and what rows give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class _Rule:
    """Whether a query attends to a key, for broadcastable arrays of indices. Equal rules share a trace.

    A query is given by its index in the row; with several responses, by
    `index + (start of its response << 16)`.
    """

    prefix: int
    several: bool

    def __call__(self, query, key):
        if not self.several:
            return key <= query
        return (key <= (query & 0xFFFF)) & ((key < self.prefix) | (key >= (query >> 16)))


@dataclass(frozen=True)
class _WindowRule:
    """As `_Rule`. A query is given by `last key + (first key << 15)`, the first one of the prefix."""

    prefix: int
    responses: int
    length: int
    window: int

    def __call__(self, query, key):
        last, first = query & 0x7FFF, query >> 15
        own = key > last - self.window  # of a response
        for response in range(1, self.responses):
            start = self.prefix + response * self.length
            own = own & ((key >= start) | (last < start))
        return (key <= last) & (key >= first) & ((key < self.prefix) | own)


@dataclass(frozen=True)
class PromptGroupMask(masks.Mask):
    """The attention mask of a row, `queries` x `keys` after padding.

    The kernels themselves compute a mask that has `q_sequence` and `mask_function`. Padded queries get the
    index of the last one, so that no row of the mask is empty: an empty row would divide by zero.

    With `ahead` or a window it is what any row may need, and each row's own numbers replace `q_sequence`.
    """

    prefix: int
    responses: int
    length: int
    prefix_queries: int
    queries: int
    keys: int
    ahead: int = 1
    window: int | None = None

    def __post_init__(self):
        if self.keys > 2**15:
            raise ValueError(f"a row of {self.keys} tokens exceeds the mask's 16-bit indices")

    @property
    def shape(self) -> tuple[int, int]:
        return self.queries, self.keys

    @property
    def mask_function(self) -> _Rule | _WindowRule:
        if self.window is not None:
            return _WindowRule(self.prefix, self.responses, self.length, self.window)
        return _Rule(self.prefix, self.responses > 1)

    @property
    def index(self) -> Int[np.ndarray, " q"]:
        """Of the queries in the row, before padding."""
        end = self.prefix + self.responses * self.length
        return np.arange(self.prefix - self.prefix_queries, end, dtype=np.int32)

    def numbers(self, last: Any, first: Any = 0) -> Any:
        """What the rule gets for queries whose keys end at `last` and, of the prefix, begin at `first`."""
        if self.window is not None:
            return last + (first << 15)
        if self.responses < 2:
            return last
        index = self.index
        start = np.where(index < self.prefix, 0, index - (index - self.prefix) % self.length)
        return last + (start << 16).astype(np.int32).reshape((1,) * (last.ndim - 1) + (-1,))

    @property
    def q_sequence(self) -> Int[np.ndarray, " Q"]:
        index, first = self.index, 0
        last = np.where(index < self.prefix, np.minimum(index + self.ahead, self.prefix) - 1, index)
        if self.window is not None and self.prefix_queries == self.prefix:
            first = np.where(index < self.prefix, np.maximum(index - self.window + 1, 0), 0)
        numbers = self.numbers(last, first).astype(np.int32)
        return np.pad(numbers, (0, self.queries - len(index)), mode="edge")

    def __getitem__(self, index) -> Bool[np.ndarray, "q k"]:
        queries, keys = self.q_sequence[index[0]], np.arange(self.keys)[index[1]]
        return self.mask_function(queries[:, None], keys[None])


def has_visible_key(visible: Bool[Array, "B S"], prefix: int, responses: int) -> Bool[Array, "B S"]:
    """Whether each query of a row attends to at least one visible key."""

    def since_first(x):
        at = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        return (at >= x.argmax(-1, keepdims=True)) & x.any(-1, keepdims=True)

    early = since_first(visible[:, :prefix])
    if not responses:
        return early
    own = since_first(visible[:, prefix:].reshape(len(visible), responses, -1)) | early[:, None, -1:]
    return jnp.concatenate([early, own.reshape(len(visible), -1)], axis=1)


def key_range(mask: PromptGroupMask, orders: Any, places: Any) -> tuple[Any, Any]:
    """(last key, first key of the prefix) [B, Q] of each query. Padding has the order of what is before."""
    of_queries, order = orders
    prefix, asking = mask.prefix, mask.prefix_queries
    order = jax.lax.cummax(order[:, None, :prefix], axis=2)
    last = (order <= of_queries[:, :asking, None]).sum(-1, dtype=jnp.int32) - 1
    own = jnp.broadcast_to(jnp.asarray(mask.index[asking:]), (len(order), mask.index.size - asking))
    last = jnp.concatenate([jnp.maximum(last, 0), own], axis=1)
    if mask.window is None:
        return last, jnp.zeros_like(last)
    of_queries, place = places
    place = jax.lax.cummax(place[:, None, :prefix], axis=2)
    return last, (place <= of_queries[:, :, None] - mask.window).sum(-1, dtype=jnp.int32)


def has_visible_key_in(mask: PromptGroupMask, visible, last, first) -> Bool[Array, "B Q"]:
    """Whether each query attends to at least one visible key; last, first: of `key_range`."""

    def upto(x):  # visible ones before each index
        return jnp.pad(jnp.cumsum(x, axis=-1, dtype=jnp.int32), (*[(0, 0)] * (x.ndim - 1), (1, 0)))

    early = upto(visible[:, : mask.prefix])
    stop = jnp.minimum(last + 1, mask.prefix)
    found = jnp.take_along_axis(early, stop, 1) > jnp.take_along_axis(early, jnp.minimum(first, stop), 1)
    if not mask.responses:
        return found
    own = upto(visible[:, mask.prefix :].reshape(len(visible), mask.responses, -1))
    at = np.arange(mask.length)
    begin = np.maximum(at + 1 - (mask.window or mask.length), 0)
    own = (own[:, :, at + 1] > own[:, :, begin]).reshape(len(visible), -1)
    asking = mask.prefix_queries
    return jnp.concatenate([found[:, :asking], found[:, asking:] | own], axis=1)
