"""Nearest neighbours against numpy, with blocks that the rows do not fill."""

import numpy as np
import pytest

from mllm_align.ops.nearest import nearest


def by_numpy(queries, pool, count, own):
    """Stable: of equal scores the first in the pool."""
    scores = queries.astype(np.float64) @ pool.T.astype(np.float64)
    known = own >= 0
    scores[np.flatnonzero(known), own[known]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("blocks", [(3, 5), (7, 8), (64, 64)])
def test_as_numpy_finds_them(blocks):
    rng = np.random.default_rng(0)
    queries, pool = (rng.standard_normal((count, 6)).astype(np.float32) for count in (7, 23))
    own = np.array([-1, 3, 22, 0, 8, -1, 21], np.int32)
    places, scores = nearest(queries, pool, 4, own, blocks)
    wanted, values = by_numpy(queries, pool, 4, own)
    np.testing.assert_array_equal(places, wanted)
    np.testing.assert_allclose(scores, values, rtol=1e-5)


def test_of_equal_ones_the_first():
    rng = np.random.default_rng(1)
    pool = rng.integers(-2, 3, (40, 3)).astype(np.float32)  # exact products, many of them equal
    own = np.arange(40, dtype=np.int32)
    places, scores = nearest(pool, pool, 6, own, (16, 7))
    wanted, values = by_numpy(pool, pool, 6, own)
    np.testing.assert_array_equal(places, wanted)
    np.testing.assert_array_equal(scores, values)
    assert not (places == own[:, None]).any()


def test_a_pool_of_negative_scores_has_no_padding_in_it():
    places, scores = nearest(
        -np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 2, np.array([-1]), (4, 2)
    )
    assert (places.tolist(), scores.tolist()) == ([[0, 1]], [[-2.0, -2.0]])
