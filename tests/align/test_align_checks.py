"""Objectives that do not keep the contract are refused in one line that says what is wrong."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import pytest
from refusals import refusal

from mllm_align import Config, Objective, Terms
from mllm_align.align.checks import check_count, check_objective, check_setting, check_terms
from mllm_align.align.contract import OBJECTIVES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_the_package_keeps_the_contract(name):
    objective = OBJECTIVES[name]()
    if "references" in objective.needs:
        objective = replace(objective, references=("a", "b"))
    check_objective(objective)
    check_terms(objective)


@dataclass(frozen=True)
class Good(Objective):
    responses = 2

    def weights(self, responses):
        return {"pairs": responses.weight.sum()}

    def init_state(self):
        return {"steps": jnp.zeros((), jnp.int32)}

    def __call__(self, signals, state):
        total = (signals.policy[0].sum((1, 2)) * signals.weight).sum()
        return Terms({"pairs": total}, {"logps/all": (total, signals.weight.sum())})

    def update(self, state, stats):
        return {"steps": state["steps"] + 1}


def test_a_good_one_passes():
    check_terms(Config(objective=Good()).objective)


# ---- the class ---------------------------------------------------------------------------------------


@dataclass
class Thawed:
    responses = 2


class Bare(Good):
    """Not decorated: its fields would not be those that it seems to have."""


@dataclass(frozen=True)
class Needy(Good):
    needs = frozenset({"features", "reference"})


@dataclass(frozen=True)
class Torn(Good):
    needs = frozenset({"score", "reference"})


@dataclass(frozen=True)
class Worded(Good):
    needs = "reference"  # type: ignore[assignment]


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
        (Needy(), "objective Needy needs features; the train step has changes, kl, reference, references"),
        (Torn(), "objective Torn needs score and reference; what scores predicts no tokens"),
        (Worded(), "objective Worded needs 'reference'; it must be a frozenset of names"),
        (Countless(), "objective Countless does not say how many responses it compares"),
        (TwoViews(), "objective TwoViews has the views ((0, 1), (0,)); batches have ((0, 1),)"),
        (Odd(), "objective.beta is 'much'; it must be of type float"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_class_that_does_not_keep_the_contract(objective, said):
    assert said in refusal(lambda: Config(objective=objective))


# ---- its functions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(Good):
    def __call__(self, signals, state):
        return signals.rewards


@dataclass(frozen=True)
class Bargain(Good):
    """Asks for what it does not need."""

    def __call__(self, signals, state):
        return Terms({"pairs": signals.reference[0].sum()}, {})


@dataclass(frozen=True)
class Tuple(Good):
    def __call__(self, signals, state):
        return signals.weight.sum(), signals.weight.sum()


@dataclass(frozen=True)
class Renamed(Good):
    def weights(self, responses):
        return {"tokens": responses.weight.sum()}


@dataclass(frozen=True)
class Rows(Good):
    def weights(self, responses):
        return {"pairs": responses.weight}


@dataclass(frozen=True)
class Counted(Good):
    def weights(self, responses):
        return {"pairs": responses.mask.sum()}


@dataclass(frozen=True)
class Measured(Good):
    def __call__(self, signals, state):
        return Terms({"pairs": signals.weight.sum()}, {"margin": signals.weight})  # type: ignore[dict-item]


@dataclass(frozen=True)
class Shadowing(Good):
    def __call__(self, signals, state):
        one = signals.weight.sum()
        return Terms({"pairs": one}, {"loss/pairs": (one, one)})


@dataclass(frozen=True)
class Growing(Good):
    def update(self, state, stats):
        return {"steps": state["steps"] + jnp.ones(2, jnp.int32)}


@dataclass(frozen=True)
class Exiting(Good):
    def init_state(self):
        raise RuntimeError("two\nlines")


@pytest.mark.parametrize(
    "objective, said",
    [
        (Fails(), "Fails fails (AttributeError: 'Signals' object has no attribute 'rewards')"),
        (Bargain(), "Bargain fails (TypeError: 'NoneType' object is not subscriptable)"),
        (Tuple(), "Tuple: __call__ returns tuple; it must return Terms(sums, metrics, stats)"),
        (Renamed(), "Renamed: weights has the terms ['tokens'], sums ['pairs']; they must be the same"),
        (Rows(), "Rows: the weight of 'pairs' is float32[2]; it must be a real scalar"),
        (Counted(), "Counted: the weight of 'pairs' is int32[]; it must be a real scalar"),
        (Measured(), "Measured: metric 'margin' must be (sum, weight), two scalars"),
        (Shadowing(), "Shadowing: metric 'loss/pairs' has a name that the train step uses"),
        (Growing(), "Growing: update must return a state of the same tree, shapes and dtypes"),
        (Exiting(), "Exiting fails (RuntimeError: two lines)"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_functions_that_do_not_fit_together(objective, said):
    assert f"objective {said}" in refusal(check_terms, objective)


# ---- its settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, said",
    [
        (-0.1, "objective.beta is -0.1; it must be at least 0 and below 1e+06"),
        (float("nan"), "objective.beta is nan; it must be at least 0"),
        (10**400, "objective.beta is far too large; it must be"),
        (True, "objective.beta is 'True'; it must be a number"),
        ("1", "objective.beta is '1'; it must be a number"),
    ],
)
def test_settings_out_of_range(value, said):
    assert said in refusal(check_setting, "beta", value, 0)
    check_setting("beta", 0, 0)


@pytest.mark.parametrize(
    "value, said",
    [
        (0, "objective.responses is 0; it must be from 2 to 8"),
        (9, "objective.responses is 9; it must be from 2 to 8"),
        (10**400, "objective.responses is far too large; it must be from 2 to 8"),
        (2.0, "objective.responses is '2.0'; it must be a whole number"),
        (True, "objective.responses is 'True'; it must be a whole number"),
    ],
)
def test_counts_out_of_range(value, said):
    assert said in refusal(check_count, "responses", value, 2, 8)
    check_count("responses", 2, 2, 8)
