"""Pseudo-domains and the probe: known clusters, and a probability by hand."""

import jax
import numpy as np
import pytest
from refusals import assert_refusal
from runs import MODEL, PAIRS, bundle, compiling
from test_items import read

from mllm_align.config import DataConfig
from mllm_align.curation import domains as module
from mllm_align.curation.domains import clusters, components, domains, model_states, probe
from mllm_align.data.batches import Batches
from mllm_align.models.vlm import VisionLanguageModel, variables
from mllm_align.prepare import make_encoder

assert compiling  # a fixture


def groups(seed=0, each=40, size=12):
    """Three groups of points around far corners, and one point half-way between the first two."""
    rng = np.random.default_rng(seed)
    corners = 4 * np.eye(size)[:3]
    points = np.concatenate([corner + 0.3 * rng.standard_normal((each, size)) for corner in corners])
    return np.concatenate([points, corners[:2].mean(0, keepdims=True)]), np.repeat(np.arange(3), each)


def test_known_groups_are_found_and_what_lies_between_is_unsure():
    points, known = groups()
    found = domains(points.astype(np.float32), 3, seed=0)
    for domain in range(3):
        assert len(set(known[found.labels[:-1] == domain])) == 1
    assert sorted(found.sizes) == [40, 40, 41] and found.accuracy > 0.98
    assert found.entropy.argmax() == len(points) - 1, "the point between two groups"
    assert np.all((found.entropy >= 0) & (found.entropy <= np.log(3)))
    again = domains(points.astype(np.float32), 3, seed=0)
    np.testing.assert_array_equal(again.entropy, found.entropy)


def test_components_keep_distances():
    points = np.random.default_rng(1).standard_normal((30, 5)) * [3, 1, 1, 1, 0.1]
    reduced = components(points)
    away = np.linalg.norm(points[:, None] - points[None], axis=-1)
    ratio = np.linalg.norm(reduced[:, None] - reduced[None], axis=-1)[~np.eye(30, dtype=bool)]
    ratio /= away[~np.eye(30, dtype=bool)]
    np.testing.assert_allclose(ratio, ratio[0])
    np.testing.assert_allclose(reduced[:, 0].var(), 1)


def test_the_probe_is_where_the_gradient_is_zero():
    points, known = groups(each=20)
    points = points[:-1]
    weights = probe(points, known, 3)
    logits = np.concatenate([points, np.ones((60, 1))], 1) @ weights
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    off = shares - np.eye(3)[known]
    np.testing.assert_allclose(points.T @ off + weights[:-1], 0, atol=1e-2)
    np.testing.assert_allclose(off.sum(0), 0, atol=1e-2)


def test_domains_without_a_record_are_none():
    labels = clusters(np.repeat([[0.0], [1.0]], 5, axis=0), 4, seed=0)
    assert sorted(np.bincount(labels)) == [5, 5]


def test_what_is_refused():
    assert_refusal(lambda: domains(np.ones((9, 3), np.float32), 3, 0), "all the same", "take another --by")
    assert_refusal(lambda: domains(np.ones((4, 3), np.float32), 3, 0), "4 records have states")


@pytest.mark.slow
def test_states_of_a_model_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", lambda model: bundle())
    records = [item.record for item in read(PAIRS)][:5]
    states = model_states(str(MODEL), records, tmp_path / "states", DataConfig(), 2)
    encoder, model = make_encoder(bundle(), DataConfig()), VisionLanguageModel(bundle().config)
    encoded = [encoder.encode(records[0], 1)]
    batch = Batches(encoded, encoder, size=1, shuffle=False, shapes=1, multiple=1)(0)
    group = jax.tree.map(lambda x: x[0], batch.group)
    of = variables(bundle().params, None)

    @jax.jit
    def hidden(group):
        features = model.apply(of, group.prefix.pixels, method="features")
        return model.apply(of, features, group.prefix, group.responses, method="hidden")[1]

    count = len(encoded[0].responses[0])
    np.testing.assert_allclose(
        states[0], np.asarray(hidden(group))[0, 0, :count].mean(0), rtol=1e-3, atol=1e-4
    )
    calls = []
    monkeypatch.setattr(module, "response_states", lambda *args, done: calls.append(args))
    again = model_states(str(MODEL), records, tmp_path / "states", DataConfig(), 2)
    assert calls == []
    np.testing.assert_array_equal(again, states)
    short = model_states(str(MODEL), records, tmp_path / "other", DataConfig(max_length=3), 2)
    assert short == [None] * 5
