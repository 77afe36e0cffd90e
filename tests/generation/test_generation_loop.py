"""When a fork ends, on a model that counts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import GREEDY
from goldens import goldens
from runs import compiling

from mllm_align.generation.loop import Forks, begin, run
from mllm_align.models.cache import Cache
from mllm_align.models.vlm import VisionLanguageModel

assert compiling  # a fixture


class Counting:
    """Every token is followed by the next number."""

    vocab, steps = 50, 0

    def apply(self, variables, now, prefix, own, order, rope, step, column, method):
        assert method == "decode"
        jax.debug.callback(self.step)
        return jax.nn.one_hot(now + 1, self.vocab), own

    def step(self):
        self.steps += 1


COUNTING = Counting()


@jax.jit
def count_on(forks, stop_mask):
    cache = Cache(None, (jnp.zeros((1, 1, 1, 1)),) * 2, jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
    return run(COUNTING, {}, cache, begin(cache, forks), stop_mask, GREEDY)


def counted(given, limit, stops=()):
    """All tokens of every fork of one row, and the steps that were taken."""
    tokens, forced = np.zeros((1, 4, 10), np.int32), np.array([list(map(len, given))], np.int32)
    for places, each in zip(tokens[0], given, strict=True):
        places[: len(each)] = each
    start, keys = np.zeros((1, 4), np.int32), np.zeros((1, 4, 2), np.uint32)
    forks, before = Forks(start, start, tokens, forced, np.array([limit], np.int32), keys), COUNTING.steps
    state = jax.block_until_ready(count_on(forks, np.isin(np.arange(COUNTING.vocab), stops)))
    jax.effects_barrier()
    told = [row[:n].tolist() for row, n in zip(state.tokens[0], state.lengths[0], strict=True)]
    return told, COUNTING.steps - before


def test_limits_and_stops_are_those_of_each_fork():
    out, steps = counted([[5], [9, 30, 20], [11, 41], [7]], [4, 3, 9, 0], stops=[43, 30])
    assert out == [[5, 6, 7, 8, 9], [9, 30, 20, 21, 22, 23], [11, 41, 42, 43], [7]]
    assert steps == 5  # until the second fork has its limit


def test_a_given_stop_ends_nothing_and_the_first_token_may():
    out, steps = counted([[5], [6], [7], [8]], [3, 3, 3, 0], stops=[5, 6, 7, 8])
    assert (out, steps) == ([[5, 6], [6, 7], [7, 8], [8]], 1)


class Breaking(Counting):
    """The logits after 8 are not all finite."""

    def __init__(self, value, places):
        self.value, self.places = value, places

    def apply(self, variables, now, *rest, **how):
        logits, own = super().apply(variables, now, *rest, **how)
        broken = (now == 8)[:, :, None] & jnp.asarray(self.places)[None, None]
        return jnp.where(broken, self.value, logits), own


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_fork_ends_at_logits_that_are_not_finite(value, everywhere):
    """It alone; logits after a given token that nothing is drawn from break nothing."""
    places = (np.arange(Counting.vocab) == 40) | everywhere
    forks = Forks(
        np.zeros((1, 4), np.int32),
        np.zeros((1, 4), np.int32),
        np.array([[[5] + [0] * 9, [7, 8, 20] + [0] * 7, [20] + [0] * 9, [8] + [0] * 9]], np.int32),
        np.array([[1, 3, 1, 1]], np.int32),
        np.array([[6, 4, 6, 0]], np.int32),
        np.zeros((1, 4, 2), np.uint32),
    )
    cache = Cache(None, (jnp.zeros((1, 1, 1, 1)),) * 2, jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
    never = jnp.zeros(Counting.vocab, bool)
    start = begin(cache, forks, logps=True)
    state = run(Breaking(value, places), {}, cache, start, never, GREEDY)
    assert state.finite.tolist() == [[False, True, True, True]]
    assert state.tokens[0, 0, :4].tolist() == [5, 6, 7, 8] and state.lengths.tolist() == [[5, 7, 7, 1]]
    assert state.tokens[0, 1, :7].tolist() == [7, 8, 20, 21, 22, 23, 24]
    assert np.isfinite(state.logps[0, 1:]).all()


def test_nothing_is_run_for_forks_that_fill_the_batch():
    assert counted([[4]] * 4, [0] * 4) == ([[4]] * 4, 0)


def test_it_stops_when_few_rows_are_left_and_goes_on_from_there():
    """A row that has ended stays as it is."""
    forks = Forks(
        np.zeros((3, 1), np.int32),
        np.zeros((3, 1), np.int32),
        np.array([[[5] + [0] * 9], [[6] + [0] * 9], [[7] + [0] * 9]], np.int32),
        np.ones((3, 1), np.int32),
        np.array([[2], [9], [4]], np.int32),
        np.zeros((3, 1, 2), np.uint32),
    )
    cache = Cache(None, (jnp.zeros((3, 1, 1, 1)),) * 2, jnp.zeros((3, 1)), jnp.ones((3, 1), bool))
    state, never = begin(cache, forks), jnp.zeros(Counting.vocab, bool)
    for enough, lengths, steps in (
        (2, [3, 3, 3], [2, 2, 2]),
        (1, [3, 5, 5], [2, 4, 4]),
        (0, [3, 10, 5], [2, 9, 4]),
    ):
        state = run(Counting(), {}, cache, state, never, GREEDY, enough)
        assert state.lengths[:, 0].tolist() == lengths and state.step.tolist() == steps
        assert int(state.unfinished.sum()) == enough and int(state.column) == max(steps) % 9
    wanted = [list(range(n, n + length)) for n, length in ((5, 3), (6, 10), (7, 5))]
    assert [row[:n].tolist() for row, n in zip(state.tokens[:, 0], lengths, strict=True)] == wanted


def test_a_decoder_of_one_layer_has_no_stack():
    golden = goldens("llavanext")
    config = replace(golden.config.decoder, layers=1)
    model = VisionLanguageModel(replace(golden.config, decoder=config))
    params = {**golden.policy, "decoder": dict(golden.policy["decoder"])}
    del params["decoder"]["layers"]

    def tokens():
        order, visible = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
        prefix = jnp.zeros((1, 3, config.hidden)), order, order[:, None], visible
        cache = model.apply({"params": params}, *prefix, method=lambda m, *x: m.decoder.prefill(*x))
        one = jnp.ones((1, 2), jnp.int32)
        forks = Forks(one, one, jnp.ones((1, 2, 9), jnp.int32), one, one, jnp.ones((1, 2, 2), jnp.uint32))
        stops = jnp.zeros(config.vocab, bool)
        return run(model, {"params": params}, cache, begin(cache, forks), stops, GREEDY).tokens

    assert jax.eval_shape(tokens).shape == (1, 2, 9)
