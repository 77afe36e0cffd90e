"""Rejected responses: where they end, which are usable, and what stands in their place."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from contexts import batch_of, context
from runs import compiling

from mllm_align import Averaged, Distorted, OnlineBDHS
from mllm_align.generation.bdhs import BDHSResult
from mllm_align.training.online import rejected
from mllm_align.training.online.rejected import Rejected, RejectedByBDHS, RejectedByNoise

assert compiling  # a fixture


class Given(Rejected):
    """Makes what it is given."""

    def __init__(self, context, made):
        self.context, self.made = context, made

    def make(self, batch, group, trained):
        assert trained == {"policy": 7}
        return self.made, {"made": (1.0, 1.0)}


def finished(maker):
    batch, group = batch_of(maker.context)
    return maker.finish(maker.begin(batch, group, {"policy": 7}, 0))


def responses(made, row):
    group = made.group.responses
    mask = np.asarray(group.mask)[0, row]
    return [np.asarray(group.tokens)[0, row, k][m].tolist() for k, m in enumerate(mask)]


def chosen_only(run):
    """The context with records of one response."""
    run.records = [replace(r, responses=r.responses[:1]) for r in run.records]
    return run


def test_a_rejected_response_stands_beside_the_chosen_one():
    run = chosen_only(context())
    records = run.records[:4]
    same, own = records[1].responses[0], np.array([50, 51], np.int32)
    made = finished(Given(run, [own, same, None, own]))
    assert responses(made, 0) == [records[0].responses[0].tolist(), [50, 51]]
    assert np.asarray(made.group.responses.weight).tolist() == [[1, 0, 0, 1]], "none, or the chosen one"
    assert made.metrics["rejected_usable"] == (2, 4) and made.metrics["made"] == (1.0, 1.0)
    assert made.metrics["rollout/seconds"][0] > 0
    text = run.encoder.text(own).strip()
    assert made.example == {
        "id": records[0].record.id,
        "responses": [records[0].record.responses[0], text],
    }
    assert made.group.responses.sampler is None


def test_averaged_a_group_without_one_goes_on_with_its_pair():
    run = context(objective=Averaged())
    own = np.array([50, 51], np.int32)
    made = finished(Given(run, [own, None, None, own]))
    assert np.asarray(made.group.responses.weight).tolist() == [[1, 1, 1, 1]]
    pairs = [[r.tolist() for r in run.records[i].responses] for i in range(2)]
    assert responses(made, 0) == [*pairs[0], [50, 51]] and responses(made, 1) == [*pairs[1], []]


def test_a_longer_response_takes_a_longer_batch():
    run = chosen_only(context())
    usual = batch_of(run)[0].shape.response
    long = np.full(usual + 1, 50, np.int32)
    assert finished(Given(run, [long] * 4)).shape.response == usual + -(-usual // 16) * 8


def test_a_noisy_response_ends_at_its_first_end_of_sequence(monkeypatch):
    run = chosen_only(context(nonfinite="skip"))
    eos = int(np.flatnonzero(run.eos_mask)[0])
    batch, group = batch_of(run)
    lengths = [len(run.records[i].responses[0]) for i in batch.records]
    tokens = np.full((1, 4, max(lengths) + 3), 60, np.int32)
    tokens[0, 1, 2] = tokens[0, 1, 4] = eos
    given = []

    def program(*settings):
        def call(params, trained, group, keys):
            given.append((settings, trained, np.asarray(keys)))
            return jnp.asarray(tokens), jnp.asarray([[True, True, False, True]])

        return call

    monkeypatch.setattr(rejected, "distorted_program", program)
    made, metrics = RejectedByNoise(run, Distorted(noise_steps=9)).make(batch, group, {"policy": 7})
    assert [None if ids is None else len(ids) for ids in made] == [lengths[0], 3, None, lengths[3]]
    assert made[1].tolist() == [60, 60, eos] and metrics == {"rollout/nonfinite": (1.0, 4.0)}
    ((settings, trained, keys),) = given
    assert settings[-1] == 9 and trained == {"policy": 7} and np.array_equal(keys, run.keys(batch, -2))


@pytest.fixture
def by_bdhs():
    run = chosen_only(context(OnlineBDHS(similarity="lexical", distortion="noise"), nonfinite="skip"))
    return RejectedByBDHS(run, run.config.online)


def test_tries_of_bdhs_come_back_in_the_batchs_order(by_bdhs, monkeypatch):
    run = by_bdhs.context
    batch, group = batch_of(run, step=1)
    records = [run.records[i] for i in batch.records]

    def made(self, given, features):
        assert features is None and [r.index for r in given] == [r.index for r in records]
        tries = [
            BDHSResult(records[0].index, "a tree", 2, True, (0.9, 0.5), 1.0, (), 1),
            BDHSResult(records[1].index, "a cat", 1, True, (0.25,), 1.0, (), 0),
            BDHSResult(records[2].index, "", 1, True, (), 1.0, (), 0, broken="logits"),
            BDHSResult(records[3].index, "  ", 3, False, (0.9, 0.8, 0.75), 1.0, (), 2),
        ]
        return reversed(tries)

    monkeypatch.setattr(type(by_bdhs.bdhs), "__call__", made)
    ids, metrics = by_bdhs.make(batch, group, {})
    assert [None if each is None else run.encoder.text(each).strip() for each in ids] == [
        "a tree",
        "a cat",
        None,
        None,
    ]
    assert metrics == {
        "bdhs/iterations": (6.0, 3.0),
        "bdhs/similarity": (1.5, 3.0),
        "bdhs/unfinished": (2.0, 3.0),
        "rollout/nonfinite": (1.0, 4.0),
    }


def test_responses_that_cannot_be_trained_on_are_none(by_bdhs):
    chosen = by_bdhs.context.records[0].record.responses[0]
    assert by_bdhs._encoded(0, "  ") is None
    assert by_bdhs._encoded(0, chosen) is None and by_bdhs._encoded(0, f" {chosen} ") is None
    assert by_bdhs._encoded(0, "a tree") is not None
    by_bdhs.context.max_length = by_bdhs.context.records[0].length
    assert by_bdhs._encoded(0, f"{chosen} {chosen}") is None, "too long"
    assert by_bdhs._encoded(0, chosen[: len(chosen) // 2]) is not None
