"""Masked image embeddings and noise: against their formulas, and the fast path against the definition."""

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from decoding import CLOSE, ROUNDING, fork, golden_bundle, logits, margin, row
from goldens import goldens
from runs import compiling

from mllm_align.batch import HostPrefix
from mllm_align.config import SamplingConfig
from mllm_align.data.distortion import noisy
from mllm_align.generation.decode import Generator
from mllm_align.generation.distortion import gathered, visible_embeddings

assert compiling  # a fixture
SAMPLED = SamplingConfig(temperature=0.8)


# ---- noise -------------------------------------------------------------------------------------------


def abar(steps):
    """What is left of the image's variance, in plain Python."""
    left = 1.0
    for k in range(1, steps + 1):
        sigmoid = 1 / (1 + math.exp(-(-6 + 12 * k / 1000)))
        left *= 1 - (sigmoid * (0.5e-2 - 1e-5) + 1e-5)
    return left


PLAIN: Any = SimpleNamespace(noise=lambda draw, shape: draw(shape))


@pytest.mark.parametrize("steps", [1, 500, 1000])
def test_noise_is_the_diffusion_of_the_paper(steps):
    pixels = np.random.default_rng(1).standard_normal((2, 5, 7, 3)).astype(np.float32)
    out = noisy(pixels, steps, np.random.default_rng(7), PLAIN)
    noise = np.random.default_rng(7).standard_normal(pixels.shape, np.float32).astype(np.float64)
    expected = math.sqrt(abar(steps)) * pixels.astype(np.float64) + math.sqrt(1 - abar(steps)) * noise
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_how_much_of_the_image_is_left():
    assert abs(abar(500) - 0.745536) < 1e-6 and abs(abar(1000) - 0.081047) < 1e-6
    out = noisy(np.full((1, 100, 100, 3), 2.0, np.float32), 500, np.random.default_rng(0), PLAIN)
    assert abs(out.mean() - 2 * math.sqrt(abar(500))) < 0.02
    assert abs(out.std() - math.sqrt(1 - abar(500))) < 0.02


# ---- which embeddings are hidden ---------------------------------------------------------------------

IMAGE = np.array([-1, -1, 1, 2, 0, 3, 4, 0, -1, -1] * 50)


def test_all_and_nothing():
    rng = np.random.default_rng(0)
    assert visible_embeddings(IMAGE, 0.0, rng).all()
    np.testing.assert_array_equal(visible_embeddings(IMAGE, 1.0, rng), IMAGE < 0)


def test_a_share_of_embeddings_and_newlines_but_no_text():
    visible = visible_embeddings(IMAGE, 0.7, np.random.default_rng(3))
    assert visible[IMAGE < 0].all()
    for kind in (IMAGE > 0, IMAGE == 0):
        assert abs(visible[kind].mean() - 0.3) < 0.15
    draws = np.random.default_rng(3).random(len(IMAGE))
    np.testing.assert_array_equal(visible[IMAGE >= 0], (draws >= 0.7)[IMAGE >= 0])


# ---- absent keys are masked keys ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """An AnyRes model with `image_newline`."""
    return forked("llavanext")


@cache
def forked(name):
    """Two forks at the end of each prompt."""
    golden = goldens(name)
    bundle = golden_bundle(golden)
    decoder, groups = Generator(bundle, SAMPLED, 4), golden.groups()
    rows = []
    for i, (group, seen) in enumerate(
        zip(groups, decoder.features([g.prefix.pixels for g in groups]), strict=True)
    ):
        ids = group.prefix.tokens
        forks = [fork(len(ids) - 1, ids[-1:], 12, f"record {i}", k) for k in range(2)]
        rows.append(row(seen, group, ids, *forks))
    return SimpleNamespace(
        bundle=bundle, decoder=decoder, rows=rows, stop_mask=np.zeros(decoder.vocab, bool)
    )


def hidden(rows, rate, seed=0):
    rng = np.random.default_rng(seed)
    return [shown(each, visible_embeddings(each.prefix.image, rate, rng)) for each in rows]


def shown(row, visible):
    return replace(row, prefix=replace(row.prefix, visible=visible))


@pytest.mark.parametrize("name", ["llavanext", "onevision"])
def test_gathered_rows_hold_what_is_visible(name):
    """Mixed embeddings keep all rows that they are mixed of."""
    for whole in hidden(forked(name).rows, 0.6):
        row = gathered(whole)
        short, visible = row.prefix, whole.prefix.visible
        image = whole.prefix.image[visible]
        np.testing.assert_array_equal(short.order, np.flatnonzero(visible))
        np.testing.assert_array_equal(short.rope[0], np.flatnonzero(visible))
        np.testing.assert_array_equal(short.tokens, whole.prefix.tokens[visible])
        np.testing.assert_array_equal(np.sign(short.image), np.sign(image))
        assert short.visible.all()
        for ours, theirs in zip(row.forks, whole.forks, strict=True):
            assert short.order[ours.at] == theirs.at and replace(ours, at=theirs.at) == theirs
        taps = [[], []] if short.taps is None else [short.taps, whole.prefix.taps[:, visible]]
        ours, theirs = (
            np.array([one, *more]) for one, more in zip((short.image, image), taps, strict=True)
        )
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        used = theirs > 0
        np.testing.assert_array_equal(row.features[ours[used] - 1], whole.features[theirs[used] - 1])
        assert len(row.features) == len(np.unique(theirs[used])) and (image == 0).any()


def test_two_places_of_one_embedding_share_it(model):
    first = model.rows[0]
    image = np.where(first.prefix.image > 0, 3, first.prefix.image)
    short = gathered(replace(first, prefix=replace(first.prefix, image=image)))
    assert len(short.features) == 1 and set(short.prefix.image.tolist()) == {-1, 0, 1}
    np.testing.assert_array_equal(short.features[0], first.features[2])


def of_all(model, rows, tokens):
    return [x for each in logits(model.decoder, model.bundle, rows, tokens) for x in each]


@pytest.mark.parametrize(
    "name, rate",
    [
        ("onevision", 0.9),
        ("llavanext", 1.0),
        pytest.param("idefics3", 0.9, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", 0.9, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", 0.8, marks=pytest.mark.slow),
        pytest.param("gemma3", 0.7, marks=pytest.mark.slow),
        pytest.param("internvl", 0.95, marks=pytest.mark.slow),
    ],
)
def test_gathered_rows_compute_what_masked_rows_do(name, rate):
    model = forked(name)
    masked = hidden(model.rows, rate)
    short = [gathered(each) for each in masked]
    for one, other in zip(short, masked, strict=True):
        hides = (~other.prefix.visible).sum()
        assert hides > 3 and len(one.prefix.tokens) == len(other.prefix.tokens) - hides
    tokens = model.decoder(masked, model.stop_mask)
    assert [[x.tolist() for x in each] for each in model.decoder(short, model.stop_mask)] == [
        [x.tolist() for x in each] for each in tokens
    ]
    ours, theirs = of_all(model, short, tokens), of_all(model, masked, tokens)
    forks = [each for row in masked for each in row.forks]
    for found, wanted, each in zip(ours, theirs, forks, strict=True):
        np.testing.assert_allclose(found, wanted, atol=CLOSE)
        assert margin(wanted, each.key, SAMPLED) > ROUNDING


def test_what_stays_keeps_its_position(model):
    """Closing the gaps would be another prompt."""
    short = [gathered(each) for each in hidden(model.rows, 0.9)]
    closed = []
    for each in short:
        prefix = HostPrefix.causal(each.prefix.tokens, each.prefix.image)
        closed.append(replace(each, prefix=prefix))
    given = [[np.arange(10, 22)] * 2] * 4
    for kept, moved in zip(of_all(model, short, given), of_all(model, closed, given), strict=True):
        assert np.abs(kept - moved).max() > 0.01


def test_nothing_masked_is_the_plain_prompt_and_hiding_the_image_tells(model):
    given = [[np.arange(10, 22)] * 2] * 4
    plain = of_all(model, model.rows, given)
    seen = of_all(model, hidden(model.rows, 0.0), given)
    blind = of_all(model, hidden(model.rows, 1.0), given)
    for a, b, c in zip(plain, seen, blind, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 0.01


def test_newlines_are_hidden_with_the_rest(model):
    """Hiding every embedding but the newlines is not hiding all."""
    rows = [shown(each, each.prefix.image <= 0) for each in model.rows]
    given = [[np.arange(10, 22)] * 2] * 4
    for some, none in zip(
        of_all(model, rows, given), of_all(model, hidden(model.rows, 1.0), given), strict=True
    ):
        assert np.abs(some - none).max() > 1e-3


def test_nothing_visible_at_all_stays_finite(model):
    rows = [shown(each, np.zeros(len(each.prefix.tokens), bool)) for each in model.rows]
    given = [[np.arange(10, 22)] * 2] * 4
    assert all(np.isfinite(x).all() for x in of_all(model, rows, given))
    assert [len(x) for each in model.decoder(rows, model.stop_mask) for x in each] == [12] * 8
