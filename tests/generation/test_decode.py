"""Decoding on a cache of keys and values: against transformers' greedy tokens, and against itself."""

from dataclasses import replace
from functools import cache, partial
from itertools import chain
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from decoding import CLOSE, GREEDY, ROUNDING, at_end, fork, golden_bundle, logits, margin, row
from goldens import goldens, union
from runs import compiling

from mllm_align.batch import Pixels, pad
from mllm_align.config import MeshConfig, SamplingConfig
from mllm_align.generation.decode import Generator, forks_of
from mllm_align.generation.sampling import random_key
from mllm_align.sharding import make_mesh

assert compiling  # a fixture
SAMPLED = SamplingConfig(temperature=0.8, top_k=50)
LIMIT = 12  # tokens run of every fork: one shape for all


@cache
def decoding(name, tag="policy", sampling=SAMPLED):
    """A decoder of a golden's model, its prompts' features and its groups."""
    golden = goldens(name)
    bundle = golden_bundle(golden, tag)
    decoder, groups = Generator(bundle, sampling, 4), golden.groups()
    features = decoder.features([group.prefix.pixels for group in groups])
    stop_mask = np.zeros(decoder.vocab, bool)
    return SimpleNamespace(
        golden=golden, bundle=bundle, decoder=decoder, groups=groups, features=features, stop_mask=stop_mask
    )


def whole(model, *forks, **changes):
    """A row for each prompt, forked at its end."""
    rows = []
    for i, (features, group) in enumerate(zip(model.features, model.groups, strict=True)):
        ids = group.prefix.tokens
        each = [fork(len(ids) - 1, ids[-1:], LIMIT, f"record {i}", sample, **changes) for sample in forks]
        rows.append(row(features, group, ids, *each))
    return rows


@pytest.fixture(scope="module")
def sampled():
    return decoding("llavanext")


def same(ours, theirs):
    return all(
        np.array_equal(a, b)
        for row, other in zip(ours, theirs, strict=True)
        for a, b in zip(row, other, strict=True)
    )


# ---- against transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tag",
    [
        ("llava15", "base"),
        ("llavanext", "policy"),
        ("onevision", "policy"),
        ("qwen3_vl", "policy"),
        *(
            pytest.param(name, "policy", marks=pytest.mark.slow)
            for name in ("idefics3", "qwen2_5_vl", "gemma3", "internvl")
        ),
    ],
)
def test_greedy_tokens_are_those_of_transformers(name, tag):
    model = decoding(name, tag, GREEDY)
    wanted = model.golden.arrays[f"{tag}/greedy_tokens"]
    rows = []
    for i, (features, group) in enumerate(zip(model.features, model.groups, strict=True)):
        ids = model.golden.arrays.get(f"prompt_ids_{i}", group.prefix.tokens)
        rows.append(row(features, group, ids, fork(len(ids) - 1, ids[-1:], wanted.shape[1])))
    out = model.decoder(rows, model.stop_mask)
    gaps = model.golden.numbers[tag]["greedy_min_gap"]
    for (tokens,), theirs, gap in zip(out, wanted, gaps, strict=True):
        assert gap > 1e-4  # no near-tie among the stored ones
        np.testing.assert_array_equal(tokens, theirs)


# ---- against the forward pass and the naive way ------------------------------------------------------


def response_logps(model, groups):
    """Of the forward pass over prompt groups, unpadded: [group][response]."""
    batch = pad(groups, union(groups), len(groups))
    (out,) = jax.device_get(jax.jit(model.golden.model.apply)({"params": model.bundle.params}, batch))
    return [
        [out[b, k, : len(ids)] for k, ids in enumerate(group.responses)] for b, group in enumerate(groups)
    ]


def token_logps(logits, tokens):
    logps = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return np.take_along_axis(logps, np.asarray(tokens)[:, None], axis=1)[:, 0]


@pytest.mark.parametrize(
    "name",
    [
        "llavanext",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("onevision", "idefics3", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
        ),
    ],
)
def test_given_tokens_have_the_log_probs_of_the_forward_pass(name):
    """Both responses of every prompt as forks at its end."""
    sampled = decoding(name)
    rows, tokens = whole(sampled, 0, 1), [group.responses for group in sampled.groups]
    found = logits(sampled.decoder, sampled.bundle, rows, tokens)
    for ours, group, theirs in zip(
        found, sampled.groups, response_logps(sampled, sampled.groups), strict=True
    ):
        for each, ids, logps in zip(ours, group.responses, theirs, strict=True):
            np.testing.assert_allclose(token_logps(each, ids), logps, atol=CLOSE)


def forked(model):
    """Prompts that go on with the chosen response; forks at its end and in its midst, in the midst of the
    prompt, and with several tokens of the rejected response given."""
    rows = []
    for i, (features, group) in enumerate(zip(model.features, model.groups, strict=True)):
        chosen, rejected = group.responses
        ids, end = np.concatenate([group.prefix.tokens, chosen]), len(group.prefix.tokens)
        places = [
            (len(ids) - 1, ids[-1:]),
            (end + 1, ids[end + 1 : end + 2]),
            (end - 3, ids[end - 3 : end]),
        ]
        places += [(end, rejected[: 2 + i])]
        forks = [
            fork(at, given, LIMIT + 1 - len(given), f"record {i}", k)
            for k, (at, given) in enumerate(places)
        ]
        rows.append(row(features, group, ids, *forks))
    return rows


def test_forks_of_one_prefill_are_what_prefills_of_their_own_give(sampled):
    rows = forked(sampled)
    forks = [each for row in rows for each in row.forks]
    out = [ids for each in sampled.decoder(rows, sampled.stop_mask) for ids in each]
    assert [len(ids) for ids in out] == [each.limit for each in forks]
    tokens = [out[i : i + 4] for i in range(0, 16, 4)]
    naive, apart, theirs = list(zip(*map(at_end, rows), strict=True)), {}, {}
    for k, each in enumerate(naive):  # fork k of every row
        drawn = sampled.decoder(each, sampled.stop_mask)
        seen = logits(sampled.decoder, sampled.bundle, each, [[ids[k]] * 4 for ids in tokens])
        for i in range(4):
            apart[4 * i + k], theirs[4 * i + k] = drawn[i][0], seen[i][0]
    assert same([out], [[apart[i] for i in range(16)]])

    ours = [x for each in logits(sampled.decoder, sampled.bundle, rows, tokens) for x in each]
    for i, (found, each) in enumerate(zip(ours, forks, strict=True)):
        found, wanted = found[len(each.forced) - 1 :], theirs[i]
        np.testing.assert_allclose(found, wanted, atol=CLOSE)
        assert margin(found, each.key, SAMPLED) > ROUNDING


def test_a_fork_sees_nothing_at_or_after_its_start(sampled):
    base = forked(sampled)[0]
    start = base.forks[2].at
    forks = tuple(replace(base.forks[2], limit=10) for _ in range(4))
    rows = [replace(base, forks=forks)]
    for places in (slice(start + 1, None), slice(start, None), slice(start - 1, start)):
        tokens = base.prefix.tokens.copy()
        tokens[places] = (tokens[places] + 7) % 300
        rows.append(replace(base, prefix=replace(base.prefix, tokens=tokens), forks=forks))
    given = [[np.arange(10, 20)] * 4] * 4
    before, after, at, other = (x[0] for x in logits(sampled.decoder, sampled.bundle, rows, given))
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(before, at)
    assert np.abs(before - other).max() > 0.01


# ---- random numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_hang_on_seed_record_and_sample_alone(sampled):
    """Not on the other rows, their order, or the size of the batch."""
    rows = whole(sampled, 0, 1)
    out = sampled.decoder(rows, sampled.stop_mask)
    assert same(out, sampled.decoder(rows, sampled.stop_mask))
    assert same(out, sampled.decoder(rows[::-1], sampled.stop_mask)[::-1])
    pair = Generator(sampled.bundle, SAMPLED, 2)
    more = pair([whole(sampled, 2, 0, 1)[i] for i in (3, 1)], sampled.stop_mask)
    assert same([out[3], out[1]], [each[1:] for each in more])
    wanted = logits(sampled.decoder, sampled.bundle, rows, out)
    for found, each in zip(wanted, rows, strict=True):
        assert min(margin(x, f.key, SAMPLED) for x, f in zip(found, each.forks, strict=True)) > ROUNDING


def test_other_seeds_records_and_samples_draw_other_tokens(sampled):
    first = sampled.decoder(whole(sampled, 0, 1), sampled.stop_mask)
    second = sampled.decoder(whole(sampled, 0, 1, seed=1), sampled.stop_mask)
    drawn = {tuple(ids.tolist()) for out in (first, second) for each in out for ids in each}
    assert len(drawn) == 16
    base = whole(sampled, 0)[0]
    two = tuple(replace(base.forks[0], key=random_key(0, name)) for name in ("one", "two"))
    (one, other), *_ = sampled.decoder([replace(base, forks=two)] * 4, sampled.stop_mask)
    assert one.tolist() != other.tolist()


# ---- rows that take turns ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_rows_begin_where_others_have_ended(sampled, devices):
    """Their tokens are those of a batch that holds all of them: with limits and stops at any place, forks
    that differ in number, a row whose logits are not finite before others in its slot, rows not sorted."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    bundle = golden_bundle(sampled.golden, mesh=mesh)
    rng, rows = np.random.default_rng(0), []
    for turn in range(5):  # more than fit 16 slots
        for i, each in enumerate(whole(sampled, 0, 1, seed=turn)):
            limits = rng.integers(1, LIMIT + 1, 2)
            forks = tuple(replace(f, limit=int(n)) for f, n in zip(each.forks, limits, strict=True))
            rows.append(replace(each, forks=forks[: 1 + (turn + i) % 2]))
    rows[1] = replace(rows[1], features=rows[1].features * np.nan)
    stops = rng.random(sampled.decoder.vocab) < 0.1
    together = Generator(sampled.bundle, SAMPLED, len(rows))(rows, stops)
    few = Generator(bundle, SAMPLED, 2 * devices)
    assert few.size == 2 * few.part == 2 * devices
    calls = []
    decode = few.programs.decode
    few.programs = few.programs._replace(decode=lambda *args: calls.append(1) or decode(*args))
    shuffled = rng.permutation(len(rows))
    ask = partial(next, (rows[i] for i in shuffled), None)
    out = dict(chain.from_iterable(few.stream(ask, stops)))
    assert sorted(out) == list(range(len(rows)))
    out = [out[n] for n in np.argsort(shuffled)]
    assert out[1] == [None] * len(rows[1].forks)
    assert same(out[:1] + out[2:], together[:1] + together[2:])
    lengths = {len(ids) for i, each in enumerate(out) if i != 1 for ids in each}
    assert len(lengths) > LIMIT // 2 and len(calls) > len(rows) / few.size


def test_rows_without_a_fork_go_along(sampled):
    rows = [replace(each, forks=each.forks * (i != 1)) for i, each in enumerate(whole(sampled, 0, 1))]
    out = sampled.decoder(rows, sampled.stop_mask)
    assert [len(each) for each in out] == [2, 0, 2, 2]
    assert not forks_of(rows[1:2], rows[0].shape).limit.any()


# ---- shapes ------------------------------------------------------------------------------------------


def test_features_are_each_records_own_and_texts_have_none(sampled):
    groups = sampled.groups
    pictures = [g.prefix.pixels for g in groups]
    text = Pixels(*(x[:0] for x in pictures[0]))
    out = sampled.decoder.features([text, *pictures[::-1]])
    assert out[0].shape == (0, sampled.features[0].shape[1])
    for ours, theirs, group in zip(out[1:], sampled.features[::-1], groups[::-1], strict=True):
        assert len(ours) == 16 * len(group.prefix.patches)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert [len(x) for x in sampled.decoder.features([text])] == [0]
