"""Decoding on a cache of keys and values: against transformers' greedy tokens, and against itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import NAMES, goldens
from runs import compiling, one_device  # noqa: F401

from mllm_align.batch import Group, pad
from mllm_align.config import SamplingConfig
from mllm_align.generate.decode import Decoder, Forks, bucket
from mllm_align.generate.sampling import random_key
from mllm_align.models.bundle import Bundle

GREEDY = SamplingConfig(temperature=0.0)
NOTHING = np.array([0], np.int32)  # a group's responses are not read here


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return goldens(request.param)


def bundle(golden, tag="base") -> Bundle:
    params = jax.device_put(getattr(golden, tag), jax.devices()[0])
    return Bundle(golden.folder, None, one_device(), jnp.dtype("float32"), params)


def prompts(golden) -> list[Group]:
    """The prompts that transformers went on with."""
    groups = []
    for i, group in enumerate(golden.groups()[: len(golden.groups())]):
        ids = golden.arrays.get(f"prompt_ids_{i}", group.prefix_tokens)
        groups.append(replace(group, prefix_tokens=ids, responses=(NOTHING,)))
    return groups


def whole(group, forks=1, limit=16, seed=0) -> dict:
    """Forks of one group's whole prefix."""
    last = len(group.prefix_tokens) - 1
    return {
        "start": np.full(forks, last, np.int32),
        "forced": np.full((forks, 1), group.prefix_tokens[-1], np.int32),
        "forced_length": np.ones(forks, np.int32),
        "limit": np.full(forks, limit, np.int32),
        "keys": np.stack([random_key(seed, "record", f) for f in range(forks)]),
    }


def stacked(each: list[dict]) -> Forks:
    return Forks(**{name: np.stack([e[name] for e in each]) for name in each[0]})


def decode(decoder, groups, forks, vocab, shape=None, size=None, stops=()):
    shape = shape or max((g.shape for g in groups), key=lambda s: s.prefix)
    for group in groups:
        shape = shape.union(group.shape)
    batch = pad(groups, shape, size or len(groups))
    ends = np.zeros(vocab, bool)
    ends[list(stops)] = True
    cache = decoder.prefill(decoder.features(batch.tiles), batch)
    return decoder.decode(cache, forks, ends)


@pytest.mark.parametrize("tag", ["base", "policy"])
def test_greedy_tokens_are_those_of_transformers(golden, tag):
    groups, wanted = prompts(golden), golden.arrays[f"{tag}/greedy_tokens"]
    decoder = Decoder(bundle(golden, tag), GREEDY)
    limit = wanted.shape[1]
    out = decode(decoder, groups, stacked([whole(g, limit=limit) for g in groups]), golden.config.decoder.vocab)
    gaps = golden.numbers[tag]["greedy_min_gap"]
    for row, tokens, gap in zip(out, wanted, gaps, strict=True):
        assert gap > 1e-4  # no near-tie among the stored ones
        np.testing.assert_array_equal(row[0], tokens)


def test_buckets_are_few_and_near():
    sizes = [bucket(n) for n in range(1, 500)]
    assert len(set(sizes)) == 13
    assert all(n <= b <= max(8, 1.5 * n) for n, b in zip(range(1, 500), sizes, strict=True))
