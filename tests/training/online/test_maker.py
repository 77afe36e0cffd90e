"""Responses that all come with the data are a maker's, too; and what a maker need not do."""

import numpy as np
import pytest
from contexts import batch_of, context

from mllm_align.training.online.maker import MakerState, Offline


def test_data_pass_through_as_they_are():
    run = context()
    batch, group = batch_of(run, step=1)
    maker = Offline(run.records)
    made = maker.finish(maker.begin(batch, group, {}, 1))
    assert made.group is group and made.records == tuple(run.records[i] for i in batch.records)
    assert (made.step, made.indices, made.shape) == (1, batch.records, batch.shape)
    assert made.metrics == {} and made.example is None
    assert not maker.ahead and not maker.on_policy, "the next batch waits for no step"


def test_a_maker_that_begins_nothing_ahead_saves_nothing():
    maker = Offline([])
    assert maker.saved([]) is None
    maker.close()
    with pytest.raises(TypeError, match="Offline saves nothing"):
        maker.restored(MakerState({}, {"a": np.ones(1)}), [batch_of(context())])
