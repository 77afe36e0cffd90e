"""Keys and values of prefixes: what `VisionLanguageModel.prefill` returns and `decode` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of B prefixes, from which any number of continuations may fork.

    layers, last: (keys, values), [L-1, B, G, P, E] of the stacked layers (None where there is but one
    layer) and [B, G, P, E] of the last. order, visible: as in the `batch.Prefix` they come from. place: the
    first axis of its `rope`, of decoders with local layers.
    """

    layers: Any
    last: Any
    order: Int[Array, "B P"]
    visible: Bool[Array, "B P"]
    place: Int[Array, "B P"] | None = None

    def empty(self, forks: int, length: int) -> tuple[Array, Array]:
        """An empty cache for the forks' own tokens: keys and values, zeros [L, B, F, G, R, E] each.

        Its R columns are written in turn, from the first again after the last. At a step all forks write
        into the same column, whatever number their token has: so rows may begin while others are under way.
        """
        layers = 1 if self.layers is None else 1 + len(self.layers[0])
        size, groups, _, dim = self.last[0].shape
        empty = jnp.zeros((layers, size, forks, groups, length, dim), self.last[0].dtype)
        return empty, empty
