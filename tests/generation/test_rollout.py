"""Samples in the middle of a run: the same as plain generation's, and the same log-probs as training's."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import PAIRS, TINY, bundle, compiling, rows

from mllm_align.batch import pad, stack, with_responses
from mllm_align.config import DataConfig, SamplingConfig
from mllm_align.data.distortion import signal_share
from mllm_align.data.records import parse_record
from mllm_align.generation import rollout as rollouts
from mllm_align.generation.decode import Fork, Generator, Row
from mllm_align.generation.respond import respond
from mllm_align.generation.rollout import distorted_program, pick_program, rollout_program
from mllm_align.generation.sampling import random_key
from mllm_align.prepare import make_encoder
from mllm_align.scoring import logps_program
from mllm_align.sharding import assemble, batch_sharding

assert compiling and TINY
SAMPLING = SamplingConfig(temperature=0.8, top_k=50, max_tokens=12)
COUNT, K = 3, 2


@pytest.fixture(scope="module")
def encoder():
    return make_encoder(bundle(), DataConfig())


@pytest.fixture(scope="module")
def records(encoder):
    made = [
        parse_record(row, index=i, where="pairs", root=PAIRS.parent) for i, row in enumerate(rows(COUNT))
    ]
    return [encoder.encode(record, 2, i) for i, record in enumerate(made)]


def batch_of(encoder, records, parts=1):
    groups = [encoder.group(record) for record in records]
    shape = groups[0].shape
    for group in groups:
        shape = shape.union(group.shape)
    size = len(groups) // parts
    whole = stack([pad(groups[i * size : (i + 1) * size], shape, size) for i in range(parts)])
    return assemble(whole, batch_sharding(bundle().mesh))


def keys_of(records, parts=1):
    keys = np.array([[random_key(0, r.record.id, k) for k in range(K)] for r in records], np.uint32)
    return jnp.asarray(keys.reshape(parts, -1, K, 2))


@pytest.fixture(scope="module")
def sampled(encoder, records):
    b = bundle()
    program = rollout_program(b.config, b.mesh, 1.0, b.dtype, SAMPLING)
    eos_mask = jnp.asarray(encoder.eos_mask(b.config.decoder.vocab))
    return program(b.params, {}, batch_of(encoder, records), keys_of(records), eos_mask)


def test_samples_are_those_of_plain_generation(encoder, records, sampled):
    plain = respond(Generator(bundle(), SAMPLING, COUNT), encoder, records, SAMPLING, K, seed=0, what=None)
    tokens, lengths = np.asarray(sampled.tokens)[0], np.asarray(sampled.lengths)[0]
    for row, each in enumerate(plain):
        for k, ids in enumerate(each):
            assert tokens[row, k, : lengths[row, k]].tolist() == ids.tolist()
    assert len({tuple(ids) for each in plain for ids in each}) > COUNT, "samples differ"


def test_the_samplers_log_probs_are_those_of_the_train_forward(encoder, records, sampled):
    b, group = bundle(), batch_of(encoder, records)
    mask = jnp.asarray(np.arange(SAMPLING.max_tokens) < np.asarray(sampled.lengths)[..., None])
    group = with_responses(group, tokens=sampled.tokens, mask=mask)
    forward = logps_program(b.config, b.mesh, 1.0, b.dtype)(
        b.params, {}, jax.tree.map(lambda x: x[0], group)
    )
    assert float(jnp.abs(jnp.where(mask[0], sampled.logps[0], 0)).max()) > 1
    np.testing.assert_allclose(np.where(mask[0], sampled.logps[0], 0), forward, atol=2e-5)


def test_rows_that_are_picked_sample_what_they_sample_in_the_whole_batch(encoder, records, sampled):
    b = bundle()
    group = batch_of(encoder, records)
    micro, row = jnp.zeros((2, 1), jnp.int32), jnp.array([[2], [0]], jnp.int32)
    picked = pick_program(b.mesh)(group, micro, row)
    program = rollout_program(b.config, b.mesh, 1.0, b.dtype, SAMPLING)
    eos_mask = jnp.asarray(encoder.eos_mask(b.config.decoder.vocab))
    again = program(b.params, {}, picked, keys_of([records[2], records[0]], 2), eos_mask)
    for at, which in enumerate((2, 0)):
        n = np.asarray(sampled.lengths)[0, which]
        assert np.array_equal(np.asarray(again.lengths)[at, 0], n)
        for k in range(K):
            mine, whole = np.asarray(again.tokens)[at, 0, k], np.asarray(sampled.tokens)[0, which, k]
            assert mine[: n[k]].tolist() == whole[: n[k]].tolist()


def test_distorted_tokens_follow_the_chosen_response(encoder, records, monkeypatch):
    """Without noise and without chance, token t is the likeliest one after the prompt and y+_{<t}."""
    b = bundle()
    monkeypatch.setattr(rollouts, "noisy", lambda patches, steps, key, layout: patches)
    monkeypatch.setattr(rollouts, "choose", lambda logits, *_: logits.argmax(-1).astype("int32"))
    distorted_program.cache_clear()
    program = distorted_program(b.config, b.mesh, 1.0, b.dtype, 500)
    keys = keys_of(records)[:, :, 0]
    drawn, finite = program(b.params, {}, batch_of(encoder, records), keys)
    drawn, finite = np.asarray(drawn)[0], np.asarray(finite)[0]
    assert finite.shape == (len(records),) and finite.all()
    distorted_program.cache_clear()
    record = records[1]
    chosen = record.responses[0]
    decoder = Generator(b, SamplingConfig(temperature=0.0), 1)
    nothing = np.zeros(b.config.decoder.vocab, bool)
    prefix = encoder.prefix(record)
    tokens = prefix.tokens
    last, key = len(tokens) - 1, np.zeros(2, np.uint32)
    forks = tuple(
        Fork(last, np.concatenate([tokens[last:], chosen[:t]]), 1, key) for t in range(len(chosen))
    )
    (features,) = decoder.features([encoder.pixels(record)])
    row = Row(features, prefix, forks)
    wanted = [int(ids[0]) for ids in decoder([row], nothing)[0]]
    assert drawn[1, : len(chosen)].tolist() == wanted


PLAIN: Any = SimpleNamespace(noise=lambda draw, shape: draw(shape))


def test_noise_on_the_device_is_that_of_the_paper():
    pixels = jnp.full((2, 64, 64, 3), 3.0)
    keys = jnp.asarray(random_key(0, "a"))
    for steps in (1, 500, 1000):
        made = np.asarray(rollouts.noisy(pixels, steps, keys, PLAIN))
        left = signal_share(steps)
        assert made.mean() == pytest.approx(3 * left**0.5, abs=0.03)
        assert made.var() == pytest.approx(1 - left, abs=0.03)
    again = np.asarray(rollouts.noisy(pixels, 1000, keys, PLAIN))
    assert np.array_equal(made, again)
    other = rollouts.noisy(pixels, 1000, jnp.asarray(random_key(0, "b")), PLAIN)
    assert not np.array_equal(made, np.asarray(other))
