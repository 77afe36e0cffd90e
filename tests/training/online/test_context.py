"""How responses get into a batch, and the keys of what is drawn for them."""

import numpy as np
import pytest
from contexts import batch_of, context
from runs import compiling

from mllm_align import IPO, Averaged
from mllm_align.errors import NotFinite
from mllm_align.generation.sampling import random_key
from mllm_align.training.online.context import Response

assert compiling  # a fixture


def ids(*values):
    return np.array(values, np.int32)


def test_responses_are_put_in_their_places():
    run = context(micro_batches=2, objective=IPO())
    batch, group = batch_of(run)
    first, second = Response(ids(5, 6, 7), np.float32([-1, -2, -3])), Response(ids(8))
    made = run.train_batch(
        batch, group, [(first, second), None, (second, second), None], lambda n: n + 2, {"a": (1, 2)}
    )
    responses = made.group.responses
    assert responses.tokens.shape == (2, 2, 2, 5), "[micro-batches, rows, K, padded]"
    tokens, mask = (np.asarray(x).reshape(4, 2, 5) for x in (responses.tokens, responses.mask))
    assert tokens[0].tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]]
    assert mask.sum(2).tolist() == [[3, 1], [0, 0], [1, 1], [0, 0]] and (mask == (tokens > 0)).all()
    assert np.asarray(responses.weight).tolist() == [[1, 0], [1, 0]]
    assert made.group.views == ((0, 1),) and made.group.prefixes is group.prefixes
    assert responses.sampler is None and responses.reference is None
    assert made.metrics == {"groups_used": (2.0, 4), "a": (1, 2)} and made.shape.response == 5
    assert [None if r is None else [len(x) for x in r.responses] for r in made.records] == [
        [3, 1],
        None,
        [1, 1],
        None,
    ]


def test_log_probs_of_the_sampler_travel_with_its_tokens():
    run = context(objective=IPO())
    batch, group = batch_of(run)
    sampled = Response(ids(5, 6), np.float32([-0.5, -0.25]))
    made = run.train_batch(
        batch, group, [(sampled, Response(ids(7)))] * 4, lambda n: n, {}, None, sampler=True
    )
    assert np.asarray(made.group.responses.sampler)[0, 0].tolist() == [[-0.5, -0.25], [0, 0]]


def test_a_group_may_lack_its_last_response():
    """The averaged loss goes on with the pair of the data: the third is empty, the group counts."""
    run = context(objective=Averaged())
    batch, group = batch_of(run)
    pair = Response(ids(1)), Response(ids(2))
    made = run.train_batch(batch, group, [pair, (*pair, Response(ids(3))), None, None], lambda n: n, {})
    assert np.asarray(made.group.responses.mask)[0, :, :, 0].tolist() == [
        [True, True, False],
        [True, True, True],
        [False] * 3,
        [False] * 3,
    ]
    assert np.asarray(made.group.responses.weight).tolist() == [[1, 1, 0, 0]]


def test_the_last_batch_of_an_epoch_is_filled_up():
    run = context(records=context().records[:6])
    batch, group = batch_of(run, step=1)
    assert len(batch.records) == 2
    made = run.train_batch(batch, group, [(Response(ids(1)), Response(ids(2)))] * 2, lambda n: n, {})
    assert np.asarray(made.group.responses.weight).tolist() == [[1, 1, 0, 0]]
    assert made.metrics["groups_used"] == (2.0, 2)
    keys = run.keys(batch)
    assert keys.shape == (1, 4, 2) and (keys[0, 2:] == keys[0, 0]).all()


def test_a_key_follows_from_record_and_pass_alone():
    run = context(records=context().records[:8], seed=3)
    name = run.records[5].record.id
    assert (run.key(5, 0, 1) == random_key(3, name, 0, 1)).all()
    assert (run.key(5, 1, 1) == run.key(5, 0, 1)).all(), "whatever batch of the pass it is in"
    assert (run.key(5, 2, 1) == random_key(3, name, 1, 1)).all(), "two batches of four are a pass"


def test_logits_that_are_not_finite_are_counted_or_stop_the_run():
    run = context(nonfinite="skip")
    batch, _ = batch_of(run)
    assert run.nonfinite(batch, [1, 2]) == {"rollout/nonfinite": (2.0, 4.0)}
    run = context()
    assert run.nonfinite(batch, []) == {"rollout/nonfinite": (0.0, 4.0)}
    name = run.records[batch.records[1]].record.id
    with pytest.raises(NotFinite, match=rf"step 1: logits of the policy's own .* 1 of 4 records: {name}; "):
        run.nonfinite(batch, [1])
