"""A group with K responses computes what K groups with one response compute."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import goldens, packed_images, union

from mllm_align.batch import Group, HostPrefix, Pixels, Shape, pad
from mllm_align.models.vlm import VisionLanguageModel


def two_images(first, second):
    """Both prompts one after the other: the second's rows move on by the first's tiles."""
    config = goldens("llavanext").config
    one, two = first.prefix, second.prefix
    moved = two.image + np.where(two.image > 0, len(one.patches) * config.vision.tokens, 0)
    prefix = HostPrefix.causal(
        np.concatenate([one.tokens, two.tokens]),
        np.concatenate([one.image, moved]).astype(np.int32),
        Pixels(*map(np.concatenate, zip(one.pixels, two.pixels, strict=True))),
    )
    return Group((prefix,), second.responses)


def take(group, *lengths):
    """As many responses, cut to these lengths."""
    pool = np.concatenate(group.responses)
    starts = np.arange(len(lengths)) * 5
    responses = tuple(pool[s : s + n] for s, n in zip(starts, lengths, strict=True))
    return Group(group.prefixes, responses)


def single(group):
    return [Group(group.prefixes, (r,)) for r in group.responses]


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
            (logps,) = VisionLanguageModel(golden.config, remat).apply({"params": params}, batch)
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
    weights = placed(WEIGHTS, batch.responses.mask.shape)
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
    compiled = jax.jit(lambda params, batch: golden.model.apply({"params": params}, batch)[0])
    return lambda batch: compiled(golden.policy, batch)


def assert_close(found, expected, tolerance):
    """Every leaf, relative to its own size; some (keys' biases) are zero but for rounding."""
    least = 1e-6 * float(optax.tree.norm(expected))
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
    assert (found[~batch.responses.mask] == 0).all()


def test_gradients_equal_those_of_separate_groups(three, separate):
    assert_close(three.gradient, separate.gradient, 2e-5)


def test_padding_itself_changes_nothing(forward, three):
    """One response at its exact size: no padding at all."""
    group = single(three.groups[2])[1]
    exact = pad([group], group.shape, 1)
    assert exact.responses.mask.all() and exact.prefix.visible.all()
    length = len(group.responses[0])
    np.testing.assert_allclose(forward(exact)[0, 0], three.logps[2, 1, :length], atol=1e-5)


def test_what_padding_holds_does_not_matter(run, three):
    batch, rng = three.batch, np.random.default_rng(0)
    prefix = np.arange(batch.shape.prefix) >= batch.prefix.length[:, None]
    counts = [len(g.prefix.patches) for g in (*three.groups, *three.groups[:1] * 2)]
    tiles = np.arange(batch.shape.tiles) >= np.array(counts)[:, None]
    filler = batch.responses.weight == 0

    def filled(values, padding, low, high):
        noise = rng.integers(low, high, values.shape).astype(values.dtype)
        padding = padding.reshape(padding.shape + (1,) * (values.ndim - padding.ndim))
        return np.where(padding, noise, values)

    one, responses = batch.prefix, batch.responses
    order = filled(one.order, prefix, 0, 500)
    noisy = replace(
        one,
        patches=filled(one.patches, tiles | filler[:, None], -9, 9),
        place=filled(one.place, tiles | filler[:, None], -9, 9),
        tokens=filled(one.tokens, prefix, 0, 300),
        image=filled(one.image, prefix, -1, 20),
        order=order,
        rope=order[:, None],
    )
    tokens = filled(responses.tokens, ~responses.mask, 0, 300)
    other = replace(batch, prefixes=(noisy,), responses=replace(responses, tokens=tokens))
    logps, gradient = run(other, three.weights)
    real = batch.responses.weight > 0
    np.testing.assert_allclose(logps[real], three.logps[real], atol=1e-6)
    assert_close(gradient, three.gradient, 1e-5)


@pytest.mark.parametrize(
    "remat",
    [*(pytest.param(r, marks=pytest.mark.slow) for r in ("dots", "attention")), "full"],
)
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
        golden.layout.rows(h, w, at) for (w, h), at in zip(sizes, (0, len(a.prefix.patches)), strict=True)
    )
    assert pair.prefix.image[pair.prefix.image >= 0].tolist() == [*first, *second]
    groups = [a, c, pair]
    batch = pad(groups, union(groups), 3)
    one, two, both = packed_images(golden.model, golden.policy, batch)
    np.testing.assert_allclose(both, np.concatenate([one, two]), atol=1e-6)


@pytest.fixture(scope="module")
def two_prefixes():
    """Groups of two prefixes: all responses continue the first, the first response the second, too. Its
    image is another, of another shape."""
    golden = goldens("llavanext")
    a, b, c, _ = golden.groups()
    own, others = [take(a, 7, 9), take(b, 5, 4)], [c.prefixes, a.prefixes]
    views = ((0, 1), (0,))
    groups = [
        Group((*one.prefixes, *more), one.responses, views) for one, more in zip(own, others, strict=True)
    ]
    second = [Group(more, one.responses[:1]) for one, more in zip(own, others, strict=True)]
    return SimpleNamespace(groups=groups, first=own, second=second)


@pytest.mark.slow
def test_a_second_prefix_is_a_group_of_its_own(two_prefixes):
    """Log-probs, and the gradient of both views together, are those of two separate batches."""
    golden, many = goldens("llavanext"), two_prefixes
    weights = [WEIGHTS[:2, :2, :9], WEIGHTS[:2, 2:, :9]]

    @jax.jit
    def together(params, batch):
        def total(params):
            logps = golden.model.apply({"params": params}, batch)
            return sum(
                (x * w[..., : x.shape[-1]]).sum() for x, w in zip(logps, weights, strict=True)
            ), logps

        gradient, logps = jax.grad(total, has_aux=True)(params)
        return logps, gradient

    def padded(groups):
        shape = union(groups)
        return pad(groups, replace(shape, response=9), 2)

    batch = padded(many.groups)
    assert batch.shape.others and batch.shape.others[0] != (batch.shape.prefix, batch.shape.tiles)
    found, gradient = together(golden.policy, batch)
    apart = []
    for groups, weight in zip((many.first, many.second), weights, strict=True):

        def total(params, one, weight):
            (logps,) = golden.model.apply({"params": params}, one)
            return (logps * weight).sum(), logps

        apart.append(jax.jit(jax.grad(total, has_aux=True))(golden.policy, padded(groups), weight))
    for ours, (_, theirs) in zip(found, apart, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(found[0][:, :1] - found[1]).max() > 0.01  # the image matters
    assert_close(gradient, jax.tree.map(jnp.add, apart[0][0], apart[1][0]), 2e-5)


# ---- embeddings that are mixed of several rows; images of any size ---------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onevision", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_group_of_other_families_is_separate_groups(name):
    """Log-probs and gradients; what padding names as a row does not matter."""
    golden = goldens(name)
    groups = [take(group, 7, 9) for group in golden.groups()[1:]]
    if name == "onevision":
        assert {bool(group.prefix.mix.any()) for group in groups} == {True, False}
    elif name == "gemma3":
        assert all(len(group.prefix.tokens) > golden.config.decoder.local.window for group in groups)
    else:
        assert len({len(group.prefix.patches) for group in groups}) == 2 and golden.config.joined
    weights = WEIGHTS[:, :2, :9]

    @jax.jit
    def run(params, batch, weights):
        def weighted(params):
            (logps,) = golden.model.apply({"params": params}, batch)
            return (logps * weights).sum(), logps

        gradient, logps = jax.grad(weighted, has_aux=True)(params)
        return logps, gradient

    batch = roomy(groups)
    if batch.prefix.taps is not None:
        padding = np.arange(batch.shape.prefix) >= batch.prefix.length[:, None]
        noise = np.random.default_rng(0).integers(0, 20, batch.prefix.taps.shape).astype(np.int32)
        taps = np.where(padding[:, None], noise, batch.prefix.taps)
        mix = np.where(padding[:, None], np.float32(9), batch.prefix.mix)
        batch = replace(batch, prefixes=(replace(batch.prefix, taps=taps, mix=mix),))
    logps, gradient = run(golden.policy, batch, placed(weights, batch.responses.mask.shape))
    ones = [one for group in groups for one in single(group)]
    apart, wanted = run(golden.policy, pad(ones, union(ones), len(ones)), weights.reshape(-1, 1, 9))
    for k, (i, j) in enumerate(np.ndindex(len(groups), 2)):
        length = len(ones[k].responses[0])
        np.testing.assert_allclose(logps[i, j, :length], apart[k, 0, :length], atol=1e-5)
    assert_close(gradient, wanted, 2e-5)
