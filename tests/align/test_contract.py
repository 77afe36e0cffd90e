"""What an objective gets, and what it need not say of itself."""

import numpy as np
from signals import signals

from mllm_align import DPO, SFT, Averaged
from mllm_align.align.contract import Signals


def test_one_view_of_all_responses_and_no_state_unless_it_says_otherwise():
    assert Averaged().views == ((0, 1, 2),) and SFT().views == ((0,),)
    assert DPO().init_state() == () and DPO().update((), ()) == ()
    assert DPO().held_out == DPO() and Averaged(pair=DPO(0.3)).held_out == DPO(0.3)


def test_the_mask_of_a_view_is_that_of_its_responses():
    mask = np.arange(4) < np.array([[[1], [2], [3]], [[4], [0], [2]]])
    given = signals(np.zeros(mask.shape), None, mask, [1.0, 0.5])
    assert np.array_equal(given.mask(), mask) and given.weight.tolist() == [1.0, 0.5]
    two = Signals(given.policy, None, given.responses, ((0, 1, 2), (2, 0)))
    assert np.array_equal(two.mask(1), mask[:, [2, 0]])
