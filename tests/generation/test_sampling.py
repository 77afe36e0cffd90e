"""Which token comes next: filters against a plain float64 reference, draws by their frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.config import SamplingConfig
from mllm_align.generation.sampling import (
    BLOCK,
    DROPPED,
    _inverse_cdf,
    choose,
    described,
    filtered,
    random_key,
    uniform,
)

ROWS, VOCAB = 16, 64


def plain(logits, config):
    """Probabilities after temperature, top-k and top-p, one row at a time in float64."""
    out = []
    for row in np.asarray(logits, np.float64) / config.temperature:
        kept = np.ones(len(row), bool)
        if config.top_k is not None:
            kept &= row >= np.sort(row)[::-1][min(config.top_k, len(row)) - 1]
        if config.top_p < 1:
            weights = np.where(kept, np.exp(row - row.max()), 0.0)
            ranked = np.sort(weights / weights.sum())[::-1]
            count = int((np.cumsum(ranked) < config.top_p).sum()) + 1  # the fewest that reach it
            kept &= weights / weights.sum() >= ranked[min(count, len(row)) - 1]
        weights = np.where(kept, np.exp(row - row.max()), 0.0)
        out.append(weights / weights.sum())
    return np.array(out)


@pytest.fixture(scope="module")
def logits():
    return (np.random.default_rng(0).standard_normal((ROWS, VOCAB)) * 3).astype(np.float32)


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 100},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999, "temperature": 3.0},
    {"top_k": 10, "top_p": 0.7, "temperature": 1.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_may_be_chosen_and_how_likely_it_is(logits, settings):
    config = SamplingConfig(**settings)
    found = np.asarray(filtered(jnp.asarray(logits), config), np.float64)
    weights = np.exp(found - found.max(-1, keepdims=True))
    expected = plain(logits, config)
    np.testing.assert_array_equal(weights > 0, expected > 0)
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), expected, atol=1e-6)


def test_ties_with_the_last_one_kept_are_kept():
    tied = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    for settings in ({"top_k": 2}, {"top_p": 0.5}):
        kept = np.asarray(filtered(tied, SamplingConfig(**settings)))[0] > DROPPED
        assert kept.tolist() == [True, True, True, False, False]
    equal = jnp.zeros((1, 5))
    assert (np.asarray(filtered(equal, SamplingConfig(top_k=1, top_p=0.1))) == 0).all()


def keys(count, seed=0):
    return np.stack([random_key(seed, str(i)) for i in range(count)])


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({}, [0.5, 0.25, 0.15, 0.1, 0.0]),
        ({"temperature": 0.5}, [0.7246, 0.1812, 0.0652, 0.0290, 0.0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.8}, [0.5556, 0.2778, 0.1667, 0, 0]),
    ],
    ids=str,
)
def test_draws_come_as_often_as_they_should(settings, wanted):
    count = 20_000
    with np.errstate(divide="ignore"):
        row = np.maximum(np.log([0.5, 0.25, 0.15, 0.1, 0.0]), -60).astype(np.float32)
    config = SamplingConfig(**settings)
    draw = jax.jit(lambda logits, keys: choose(logits, uniform(keys, jnp.arange(count) % 7), config))
    tokens = np.asarray(draw(jnp.tile(row, (count, 1)), keys(count)))
    share = np.bincount(tokens, minlength=5) / count
    spread = np.sqrt(np.array(wanted) * (1 - np.array(wanted)) / count)
    np.testing.assert_allclose(share, wanted, atol=1e-4 + 4 * spread.max())
    assert (share[np.array(wanted) == 0] == 0).all()


@pytest.mark.parametrize("vocab", [128, 129, 700])
def test_draws_across_blocks_of_the_vocabulary(vocab):
    """Frequencies of all tokens (chi-square with many degrees of freedom), and none that was dropped."""
    count = 40_000
    row = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32)
    config = SamplingConfig(top_k=vocab // 2)
    wanted = plain(row[None], config)[0] * count
    many = jnp.tile(row, (5000, 1))
    draw = jax.jit(lambda many, at: choose(many, uniform(keys(1), at), config))
    drawn = [draw(many, start + jnp.arange(5000)) for start in range(0, count, 5000)]
    found = np.bincount(np.concatenate(drawn), minlength=vocab)
    kept = wanted > 0
    assert not found[~kept].any()
    error, free = ((found - wanted)[kept] ** 2 / wanted[kept]).sum(), kept.sum() - 1
    assert abs(error - free) < 4 * np.sqrt(2 * free)


def test_what_was_dropped_is_never_drawn_where_numbers_are_extreme():
    """Also with the least and the greatest number, and where rounding makes sums rise without mass."""
    mass = np.zeros((3, BLOCK), np.float32)
    mass[0, [7, 90]] = 1e-7, 1e-7
    mass[1, 5:101:2] = np.random.default_rng(0).random(48) * 1e-3
    mass[2, [0, 3]] = 1.0, 1e-12
    for number in [0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))]:
        found = np.asarray(_inverse_cdf(jnp.asarray(mass), jnp.full(3, number)))
        assert (mass[np.arange(3), found] > 0).all()
    assert _inverse_cdf(jnp.asarray(mass), jnp.full(3, 0.5)).tolist()[0] == 90


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_still_give_a_token(bad):
    """A run tells of them by its loss; a token that is none would end it before that."""
    logits = jnp.full((ROWS, 300), bad, jnp.float32)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.5}):
        tokens = np.asarray(choose(logits, uniform(keys(ROWS), 0), SamplingConfig(**settings)))
        assert ((tokens >= 0) & (tokens < 300)).all()


def test_greedy_takes_the_likeliest_and_the_first_of_equals(logits):
    greedy = SamplingConfig(temperature=0.0, top_k=3, top_p=0.5)
    numbers = uniform(keys(ROWS), 0)
    out = choose(jnp.asarray(logits), numbers, greedy)
    np.testing.assert_array_equal(out, logits.argmax(-1))
    assert out.dtype == jnp.int32
    tied = jnp.asarray([[0.0, 1.0, 1.0]])
    assert choose(tied, numbers[:1], greedy).tolist() == [1]
    one = SamplingConfig(top_k=1)
    np.testing.assert_array_equal(choose(jnp.asarray(logits), numbers, one), logits.argmax(-1))


def test_a_draw_hangs_on_its_own_key_and_position_alone(logits):
    config, at = SamplingConfig(), jnp.arange(ROWS)
    flat = jnp.zeros_like(logits)
    out = choose(flat, uniform(keys(ROWS), at), config)
    some = np.array([5, 2, 11])
    np.testing.assert_array_equal(
        choose(flat[some], uniform(keys(ROWS)[some], at[some]), config), out[some]
    )
    assert (choose(flat, uniform(keys(ROWS), at + 1), config) != out).sum() > ROWS // 2
    assert (choose(flat, uniform(keys(ROWS, seed=1), at), config) != out).sum() > ROWS // 2


def test_keys_of_different_draws_differ():
    names = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1), (0, "a", 10)]
    names += [(0, "0/a"), (0, "x/1", 1), (0, "1/x/1"), (1, "é"), (0, "a,1"), (0, '"a"')]
    drawn = {tuple(random_key(*name).tolist()) for name in names}
    assert len(drawn) == len(names)
    key = random_key(3, "a", 1)
    assert key.dtype == np.uint32 and key.shape == (2,)
    assert key.tolist() == random_key(3, "a", 1).tolist()


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        (SamplingConfig(temperature=0.0), "greedy, at most 512 tokens"),
        (SamplingConfig(max_tokens=8), "temperature 1, seed 3, at most 8 tokens"),
        (SamplingConfig(0.7, 50, 0.9), "temperature 0.7, top-k 50, top-p 0.9, seed 3, at most 512 tokens"),
        (
            SamplingConfig(0.0, 50, 0.9),
            "greedy (top-k 50 and top-p 0.9 only with a temperature above 0), at most 512 tokens",
        ),
    ],
)
def test_how_tokens_are_chosen_in_words(sampling, said):
    assert described(sampling, seed=3) == said
