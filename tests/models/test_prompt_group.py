"""A group with K responses computes what K groups with one response compute."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import goldens, packed_images, union

from mllm_align.batch import Group, Pixels, Shape, pad, replace, response_positions
from mllm_align.models.vlm import VisionLanguageModel


def two_images(first, second):
    """Both prompts one after the other: the second's rows move on by the first's tiles."""
    config = goldens("llavanext").config
    moved = second.prefix_image + np.where(
        second.prefix_image > 0, len(first.pixels.patches) * config.vision.tokens, 0
    )
    return Group(
        Pixels(*map(np.concatenate, zip(first.pixels, second.pixels, strict=True))),
        np.concatenate([first.prefix_tokens, second.prefix_tokens]),
        np.concatenate([first.prefix_image, moved]).astype(np.int32),
        second.responses,
    )


def take(group, *lengths):
    """As many responses, cut to these lengths."""
    pool = np.concatenate(group.responses)
    starts = np.arange(len(lengths)) * 5
    responses = tuple(pool[s : s + n] for s, n in zip(starts, lengths, strict=True))
    return Group(group.pixels, group.prefix_tokens, group.prefix_image, responses)


def single(group):
    return [Group(group.pixels, group.prefix_tokens, group.prefix_image, (r,)) for r in group.responses]


def with_count(count):
    """Three groups of `count` responses, of every length down to one token; one with two images."""
    a, b, c, _ = goldens("llavanext").groups()
    lengths = np.array([[7, 1, 12], [9, 4, 2], [1, 12, 5]])[:, :count]
    groups = [a, b, two_images(b, c)]
    return [take(g, *n) for g, n in zip(groups, lengths, strict=True)]


def roomy(groups):
    """Padding of every kind, and two rows that only fill the batch."""
    shape = union(groups)
    larger = Shape(shape.prefix + 9, shape.response + 3, shape.tiles + 2)
    return pad(groups, larger, len(groups) + 2)


def placed(values, shape):
    out = np.zeros(shape, np.float32)
    out[tuple(slice(n) for n in values.shape)] = values
    return out


@pytest.fixture(scope="module")
def run():
    """run(batch, weights, remat) -> log-probs and the parameters' gradient of their weighted sum."""
    golden = goldens("llavanext")

    @jax.jit(static_argnames="remat")
    def compiled(params, batch, weights, remat):
        def weighted(params):
            logps = VisionLanguageModel(golden.config, remat).apply({"params": params}, batch)
            return (logps * weights).sum(), logps

        gradient, logps = jax.grad(weighted, has_aux=True)(params)
        return logps, gradient

    def run(batch, weights, remat="none"):
        return compiled(golden.policy, batch, weights, remat)

    return run


# A number for each response token, [groups, K, R], so that no mistake cancels in a sum.
WEIGHTS = np.random.default_rng(0).standard_normal((3, 3, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def three(run):
    """Three responses a group, with room to spare."""
    groups = with_count(3)
    batch = roomy(groups)
    weights = placed(WEIGHTS, batch.response_mask.shape)
    logps, gradient = run(batch, weights)
    return SimpleNamespace(groups=groups, batch=batch, weights=weights, logps=logps, gradient=gradient)


@pytest.fixture(scope="module")
def separate(run, three):
    """The same responses in groups of one, as tightly as they go into a batch."""
    groups = [one for group in three.groups for one in single(group)]
    logps, gradient = run(pad(groups, union(groups), len(groups)), WEIGHTS.reshape(9, 1, 12))
    return SimpleNamespace(logps=np.asarray(logps).reshape(3, 3, 12), gradient=gradient)


@pytest.fixture(scope="module")
def forward():
    golden = goldens("llavanext")
    compiled = jax.jit(lambda params, batch: golden.model.apply({"params": params}, batch))
    return lambda batch: compiled(golden.policy, batch)


def assert_close(found, expected, tolerance):
    """Every leaf, relative to its own size; some (keys' biases) are zero but for rounding."""
    least = 1e-6 * float(optax.global_norm(expected))
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        limit = max(tolerance * np.linalg.norm(theirs), least)
        assert np.linalg.norm(ours - theirs) <= limit, jax.tree_util.keystr(path)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_log_probs_equal_those_of_separate_groups(forward, three, separate, count):
    batch = roomy(with_count(count))
    found = np.asarray(three.logps if count == 3 else forward(batch))
    for i, k in np.ndindex(3, count):
        length = len(three.groups[i].responses[k])
        np.testing.assert_allclose(found[i, k, :length], separate.logps[i, k, :length], atol=1e-5)
    assert (found[~batch.response_mask] == 0).all()


def test_gradients_equal_those_of_separate_groups(three, separate):
    assert_close(three.gradient, separate.gradient, 2e-5)


def test_padding_itself_changes_nothing(forward, three):
    """One response at its exact size: no padding at all."""
    group = single(three.groups[2])[1]
    exact = pad([group], group.shape, 1)
    assert exact.response_mask.all() and exact.prefix_visible.all()
    length = len(group.responses[0])
    np.testing.assert_allclose(forward(exact)[0, 0], three.logps[2, 1, :length], atol=1e-5)


def test_what_padding_holds_does_not_matter(run, three):
    batch, rng = three.batch, np.random.default_rng(0)
    prefix = np.arange(batch.shape.prefix) >= batch.prefix_length[:, None]
    counts = [len(g.pixels.patches) for g in three.groups] + [len(three.groups[0].pixels.patches)] * 2
    tiles = np.arange(batch.shape.tiles) >= np.array(counts)[:, None]
    filler = batch.weight == 0

    def filled(values, padding, low, high):
        noise = rng.integers(low, high, values.shape).astype(values.dtype)
        padding = padding.reshape(padding.shape + (1,) * (values.ndim - padding.ndim))
        return np.where(padding, noise, values)

    other = replace(
        batch,
        pixels=Pixels(
            filled(batch.pixels.patches, tiles | filler[:, None], -9, 9),
            filled(batch.pixels.place, tiles | filler[:, None], -9, 9),
        ),
        prefix_tokens=filled(batch.prefix_tokens, prefix, 0, 300),
        prefix_image=filled(batch.prefix_image, prefix, -1, 20),
        prefix_positions=filled(batch.prefix_positions, prefix, 0, 500),
        response_tokens=filled(batch.response_tokens, ~batch.response_mask, 0, 300),
    )
    logps, gradient = run(other, three.weights)
    real = batch.weight > 0
    np.testing.assert_allclose(logps[real], three.logps[real], atol=1e-6)
    assert_close(gradient, three.gradient, 1e-5)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_recomputing_changes_nothing(run, three, remat):
    logps, gradient = run(three.batch, three.weights, remat)
    np.testing.assert_allclose(logps, three.logps, atol=5e-6)
    assert_close(gradient, three.gradient, 1e-5)


def test_two_images_in_one_prompt():
    golden = goldens("llavanext")
    a, _, c, _ = golden.groups()
    pair = two_images(a, c)
    sizes = [golden.pictures[i].size for i in (0, 2)]
    first, second = (
        golden.layout.rows(h, w, at) for (w, h), at in zip(sizes, (0, len(a.pixels.patches)), strict=True)
    )
    assert pair.prefix_image[pair.prefix_image >= 0].tolist() == [*first, *second]
    groups = [a, c, pair]
    batch = pad(groups, union(groups), 3)
    one, two, both = packed_images(golden.model, golden.policy, batch)
    np.testing.assert_allclose(both, np.concatenate([one, two]), atol=1e-6)


def test_response_positions_go_on_after_the_last_real_token():
    batch = roomy(with_count(2))
    gaps = 3 * batch.prefix_positions
    found = np.asarray(response_positions(replace(batch, prefix_positions=jnp.asarray(gaps))))
    length = batch.response_tokens.shape[-1]
    for row, prefix in zip(found, batch.prefix_length, strict=True):
        assert row.tolist() == [list(range(3 * prefix - 2, 3 * prefix - 2 + length))] * 2


def test_a_group_that_does_not_fit_is_refused():
    groups = with_count(2)
    shape = union(groups)
    for smaller in (
        Shape(shape.prefix - 1, shape.response, shape.tiles),
        Shape(shape.prefix, shape.response - 1, shape.tiles),
        Shape(shape.prefix, shape.response, shape.tiles - 1),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            pad(groups, smaller, 3)


def test_filler_rows_repeat_the_first_group_with_weight_zero():
    batch = roomy(with_count(2))
    assert batch.weight.tolist() == [1, 1, 1, 0, 0]
    assert all(np.array_equal(x[3], x[0]) for x in jax.tree.leaves(batch) if x.ndim > 1)
