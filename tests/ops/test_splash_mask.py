"""The masks of splash attention, against masks written out."""

import numpy as np
import pytest
from definition import LENGTH, PREFIX, allowed

from mllm_align.ops.splash_mask import PromptGroupMask


@pytest.mark.parametrize("responses", [0, 1, 2, 5])
@pytest.mark.parametrize("asking", [1, PREFIX])
def test_the_rule(responses, asking):
    rows = asking + responses * LENGTH
    mask = PromptGroupMask(PREFIX, responses, LENGTH, asking, rows + 9, 1024)
    total = PREFIX + responses * LENGTH
    np.testing.assert_array_equal(mask[:rows, :total], allowed(responses)[PREFIX - asking :])
    assert mask[:, :].any(1).all()  # padded queries see something


@pytest.mark.parametrize("responses", [0, 1, 3])
def test_the_rule_with_a_window_leaves_out_what_no_row_needs(responses):
    """Of the prefix, queries of responses may need all: it may be shorter than its padding."""
    total = PREFIX + responses * LENGTH
    mask = PromptGroupMask(PREFIX, responses, LENGTH, PREFIX, total, total, 9, 40)
    place, late = np.arange(total), np.arange(total) >= PREFIX
    near = place[None] > place[:, None] - 40
    ahead = ~late[:, None] & ~late[None] & (place[None] < place[:, None] + 9)
    wanted = (allowed(responses) | ahead) & (near | (late[:, None] & ~late[None]))
    np.testing.assert_array_equal(mask[:, :], wanted)


def test_long_rows_are_refused():
    with pytest.raises(ValueError, match="32896 tokens"):
        PromptGroupMask(PREFIX, 1, LENGTH, PREFIX, 128, 2**15 + 128)
