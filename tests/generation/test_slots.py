"""New rows come in where they belong, on one device and on eight, and nothing else changes."""

import jax
import numpy as np
import pytest
from goldens import goldens

from mllm_align.config import MeshConfig
from mllm_align.generation.loop import Forks, begin
from mllm_align.generation.slots import axes, inserted, shardings, vacant
from mllm_align.models.cache import Cache
from mllm_align.sharding import make_mesh, traced_within

GROUPS, DIM, VOCAB = 2, 4, 9


def part(rng, rows, length, forks=2, tokens=5):
    """(prefix, forks) of random numbers."""

    def kept(*lead):
        return tuple(rng.random((*lead, rows, GROUPS, length, DIM), np.float32) for _ in range(2))

    order, visible = rng.integers(0, 9, (rows, length), np.int32), rng.random((rows, length)) < 0.5
    at, limit = (rng.integers(1, tokens, (rows, forks), np.int32) for _ in range(2))
    ids, keys = (
        rng.integers(0, VOCAB, (rows, forks, tokens), np.int32),
        np.ones((rows, forks, 2), np.uint32),
    )
    return Cache(kept(3), kept(), order, visible), Forks(at, at + 1, ids, np.ones_like(at), limit, keys)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_rows_come_in_where_they_belong(devices):
    config, rng = goldens("llavanext").config, np.random.default_rng(0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    size, each = 16, 16 // devices
    old, new = part(rng, size, 6), part(rng, 8, 4)
    # of 8 new rows, 3 pad; slots count from the first of their device
    slots = np.array(
        [1, each, 0, each, 1, 1, each, 0] if devices == 8 else [9, 16, 2, 16, 15, 0, 16, 7], np.int32
    )
    targets = {n: n // (8 // devices) * each + slot for n, slot in enumerate(slots) if slot < each}
    assert len(targets) == 5

    def held(cache, forks):
        state = begin(cache, forks)
        return cache, jax.tree.map(lambda x: x + np.ones((), x.dtype) if x.dtype != bool else x, state)

    before = held(*old)
    places = shardings(config, mesh)
    program = jax.jit(traced_within(mesh, lambda *x: inserted(config, *x)), out_shardings=places)
    after = jax.device_get(program(jax.device_put(before, places), *new, slots))
    fresh = new[0], begin(*new)

    def check(names, was, added, now):
        wanted = np.array(was)
        if "rows" in names:
            at, length = names.index("rows"), [slice(None)] * was.ndim
            if "prefix" in names:
                wanted_length = added.shape[names.index("prefix")]
                length[names.index("prefix")] = slice(wanted_length)
            for n, row in targets.items():
                into, source = [slice(None)] * was.ndim, [slice(None)] * was.ndim
                into[at], source[at] = row, n
                wanted[tuple(into)] = 0
                into = [row if i == at else x for i, x in enumerate(length)]
                wanted[tuple(into)] = np.asarray(added)[tuple(source)]
        np.testing.assert_array_equal(now, wanted)

    is_names = lambda x: isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)  # noqa: E731
    jax.tree.map(check, axes(config), before, fresh, after, is_leaf=is_names)


def test_a_vacant_batch_has_no_fork():
    config, (cache, forks) = goldens("llavanext").config, part(np.random.default_rng(0), 2, 4)
    prefix, state = jax.eval_shape(lambda *x: vacant(config, *x, 8, 6), cache, forks)
    assert prefix.last[0].shape == (8, GROUPS, 6, DIM) and prefix.layers[1].shape == (3, 8, GROUPS, 6, DIM)
    assert state.tokens.shape == (8, 2, 5) and state.own[0].shape == (4, 8, 2, GROUPS, 4, DIM)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(vacant(config, cache, forks, 8, 6)[1]))
