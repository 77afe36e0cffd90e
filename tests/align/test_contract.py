"""What an objective must say of itself."""

from dataclasses import dataclass

import pytest

from mllm_align import DPO, SFT, Averaged, Config
from mllm_align.align.checks import check_objective
from mllm_align.align.contract import Objective
from mllm_align.align.objectives import OBJECTIVES
from mllm_align.errors import InputError


def test_every_objective_of_the_package_is_found_by_its_name():
    assert {"dpo", "robust", "ipo", "slic", "averaged", "sft"} <= set(OBJECTIVES)
    for name, kind in OBJECTIVES.items():
        check_objective(kind())
        assert OBJECTIVES.find(name) is kind


def test_one_view_of_all_responses_and_no_state_unless_it_says_otherwise():
    assert Averaged().views == ((0, 1, 2),) and SFT().views == ((0,),)
    assert DPO().init_state() == () and DPO().update((), ()) == ()
    assert DPO().held_out == DPO() and Averaged(pair=DPO(0.3)).held_out == DPO(0.3)


@dataclass(frozen=True)
class Good(Objective):
    responses = 2


@dataclass
class Thawed:
    responses = 2


class Bare(Good):
    """Not decorated: its fields would not be those that it seems to have."""


@dataclass(frozen=True)
class Needy(Good):
    needs = frozenset({"values", "reference"})


@dataclass(frozen=True)
class Countless(Objective):
    pass


@dataclass(frozen=True)
class TwoViews(Good):
    @property
    def views(self):
        return ((0, 1), (0,))


@dataclass(frozen=True)
class Odd(Good):
    beta: float = "much"  # type: ignore[assignment]


@pytest.mark.parametrize(
    "objective, said",
    [
        (Thawed(), "it must be of type Objective"),
        (Bare(), "objective Bare is no frozen dataclass; put @dataclass(frozen=True) above it"),
        (Needy(), "objective Needy needs values; the train step computes reference"),
        (Countless(), "objective Countless does not say how many responses it compares"),
        (TwoViews(), "objective TwoViews has 2 views; batches of the data have one prefix"),
        (Odd(), "objective.beta is 'much'; it must be of type float"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_does_not_keep_the_contract_is_refused(objective, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(").replace(")", r"\)")) as caught:
        Config(objective=objective)
    assert "\n" not in str(caught.value)
