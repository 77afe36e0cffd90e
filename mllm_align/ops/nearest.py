"""Nearest neighbours by inner product: exact, block by block."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

QUERIES, POOL = 1024, 8192  # rows of a block: 32 MiB of scores


def nearest(
    queries: Float[np.ndarray, "q F"],
    pool: Float[np.ndarray, "n F"],
    count: int,
    own: Int[np.ndarray, " q"],
    blocks: tuple[int, int] = (QUERIES, POOL),
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """(places in the pool, scores) of the `count` rows of the pool with the highest inner product with each
    query, in float32, the highest first; of equal ones the first in the pool.

    own [q]: a place that is left out for each query, as it is the query itself; -1 for none. The pool must
    have more than `count` rows.
    """
    rows, width = (min(size, len(x)) for size, x in zip(blocks, (queries, pool), strict=True))
    places = np.zeros((len(queries), count), np.int32)
    scores = np.zeros((len(queries), count), np.float32)
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        some, left_out = _filled(queries[part], rows, 0.0), _filled(own[part], rows, -1)
        best = jnp.full((rows, count), -jnp.inf), jnp.zeros((rows, count), jnp.int32)
        for first in range(0, len(pool), width):
            block = _filled(pool[first : first + width], width, 0.0)
            best = _merged(best, some, block, left_out, np.int32(first), np.int32(len(pool)))
        found = [np.asarray(x)[: len(queries) - start] for x in best]
        scores[part], places[part] = found
    return places, scores


def _filled(rows: np.ndarray, count: int, value: float) -> np.ndarray:
    return np.concatenate([rows, np.full((count - len(rows), *rows.shape[1:]), value, rows.dtype)])


@partial(jax.jit, donate_argnums=0)
def _merged(
    best: tuple[Float[Array, "q k"], Int[Array, "q k"]],
    queries: Float[Array, "q F"],
    block: Float[Array, "n F"],
    own: Int[Array, " q"],
    first: Int[Array, ""],
    total: Int[Array, ""],
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """What is best of what was found before and a block of the pool, which begins at place `first`."""
    scores, places = best
    new = jnp.matmul(queries, block.T, precision="highest", preferred_element_type=jnp.float32)
    names = jnp.broadcast_to(first + jnp.arange(len(block), dtype=jnp.int32)[None], new.shape)
    new = jnp.where((names == own[:, None]) | (names >= total), -jnp.inf, new)
    both, names = (jnp.concatenate(pair, axis=1) for pair in ((scores, new), (places, names)))
    scores, which = jax.lax.top_k(both, scores.shape[1])  # stable: what was found before comes first
    return scores, jnp.take_along_axis(names, which, axis=1)
