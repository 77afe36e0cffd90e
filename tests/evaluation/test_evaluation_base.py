"""The evaluator's contract, and figures as sums by weights."""

from dataclasses import dataclass

import numpy as np
import pytest
from judges import record
from refusals import refusal

from mllm_align import Evaluator, Item, SamplingConfig, Scored
from mllm_align.config import DataConfig
from mllm_align.evaluation.base import EVALUATORS, EvaluationConfig, check_items, check_scored, figures
from mllm_align.evaluation.intervals import bootstrap

ITEMS = [Item(record(f"r{i}", images=0)) for i in range(6)]


@dataclass(frozen=True)
class Given(Evaluator):
    """Figures that a test gives."""

    def score(self, item, answer):
        return Scored(answer)


def of(scored, evaluator=None, items=None):
    return figures(evaluator or Given(), (items or ITEMS)[: len(scored)], list(map(Scored, scored)))


# ---- figures -----------------------------------------------------------------------------------------


def test_a_figure_is_the_sum_by_the_weight_with_a_bootstrap_interval():
    pairs = [(1, 2), (0, 3), (4, 4), (0, 0)]
    found = of([{"share": pair} for pair in pairs])["share"]
    assert found.mean == pytest.approx(5 / 9) and found.n == 4
    means = bootstrap(np.array(pairs, float), lambda m: m[..., 0] / np.maximum(m[..., 1], 1e-9))
    assert (found.low, found.high) == (means.low, means.high)


def test_a_number_alone_has_weight_1():
    found = of([{"right": True}, {"right": 0}, {"right": 0.5}])
    assert found["right"].mean == 0.5 and found["right"].n == 3


def test_records_that_a_figure_is_not_about_do_not_count():
    found = of([{"all": 1, "a": 1}, {"all": 0, "b": 0}, {"all": 1, "a": 0}])
    assert {name: (each.mean, each.n) for name, each in found.items()} == {
        "all": (pytest.approx(2 / 3), 3),
        "a": (0.5, 2),
        "b": (0.0, 1),
    }
    assert (found["a"].low, found["a"].high) == (bootstrap(np.array([1.0, 0.0])).low, 1.0)


def test_a_weight_of_0_is_a_figure_of_0():
    assert of([{"share": (0, 0)}, {"share": (0, 0)}])["share"].mean == 0


def test_f1_is_a_figure_like_any_other():
    """Of 3 true positives, 1 false positive, 2 false negatives: 6 / 9."""
    outcomes = [(2, 2)] * 3 + [(0, 1)] * 3
    assert of([{"f1": pair} for pair in outcomes])["f1"].mean == pytest.approx(6 / 9)


def test_groups_are_drawn_together():
    @dataclass(frozen=True)
    class Images(Given):
        def group(self, item):
            return item.labels["image"]

    items = [Item(each.record, {"image": "a" if i < 3 else "b"}) for i, each in enumerate(ITEMS)]
    found = of([{"right": i < 3} for i in range(6)], Images(), items)["right"]
    assert found.mean == 0.5 and found.n == 2 and (found.low, found.high) == (0.0, 1.0)


def test_a_derived_figure_is_drawn_with_those_it_is_made_of():
    @dataclass(frozen=True)
    class Mean(Given):
        derived = {"mean": lambda figures: (figures["a"] + figures["b"]) / 2}

    scored = [{"a": 1}, {"b": 0}, {"a": 1}, {"b": 1}]
    found = of(scored, Mean())
    assert found["mean"].mean == (found["a"].mean + found["b"].mean) / 2 == 0.75
    assert 0 <= found["mean"].low < 0.75 and found["mean"].n == 4


# ---- the contract ------------------------------------------------------------------------------------


def test_records_are_read_with_their_references():
    @dataclass(frozen=True)
    class Two(Given):
        references = 2

    row = {"prompt": "What?", "chosen": "A.", "rejected": "B."}
    (item,) = Two().items([row], DataConfig())
    assert item.record.responses == ("A.", "B.") and item.labels == {}
    assert "rejected: is missing" in refusal(
        Two().items, [{"prompt": "What?", "chosen": "A."}], DataConfig()
    )
    assert Given().items([{"prompt": "What?"}], DataConfig())[0].record.responses == ()
    assert Given().items(ITEMS, DataConfig()) == ITEMS


def test_those_of_the_package_register_themselves():
    assert {"scenes", "scenes-pope", "pope", "chair"} <= set(EVALUATORS)
    assert all(issubclass(each, Evaluator) for each in EVALUATORS.values())
    assert "is no evaluator; give one of " in refusal(EVALUATORS.find, "pop")


def test_what_breaks_the_contract():
    class Loose(Given):
        pass

    @dataclass(frozen=True)
    class Silent(Evaluator):
        pass

    @dataclass(frozen=True)
    class Else(Given):
        needs = "features"

    @dataclass(frozen=True)
    class None_(Given):
        needs = "logps"

    for evaluator, words in [
        (Loose(), "Loose is no frozen dataclass"),
        (Silent(), "Silent has no score(item, answer)"),
        (Else(), "needs 'features'; it must be responses, logps or rewards"),
        (None_(), "does not say how many answers a record has"),
        (Given(sampling=3), "evaluator.sampling is 3; it must be of type SamplingConfig"),
        ("scenes", "evaluator str is no mllm_align.Evaluator"),
    ]:
        assert words in refusal(EvaluationConfig, evaluator=evaluator)
    assert "batch_size is 0" in refusal(EvaluationConfig, Given(), batch_size=0)
    assert EvaluationConfig(Given(SamplingConfig(temperature=0.5))).evaluator.sampling.temperature == 0.5


@pytest.mark.parametrize(
    "scored, words",
    [
        ([Scored({"a": 1})], "gives 1 scores for 2 records; return one for each"),
        ([Scored({"a": 1}), 0.5], "gives float for rows 0; return Scored(...)"),
        (
            [Scored({"a": 1}), Scored({"a": float("nan")})],
            "nan} for rows 0; give each figure a finite sum",
        ),
        ([Scored({"a": 1}), Scored({"a": (1, -1)})], "{'a': (1, -1)} for rows 0"),
        ([Scored({"a": 1}), Scored({"a": "yes"})], "{'a': 'yes'} for rows 0"),
        ([Scored({"a": 1}), Scored({"a": (1, 2, 3)})], "(1, 2, 3)} for rows 0"),
        ([Scored({"a": 1}), Scored({"a": None})], "{'a': None} for rows 0"),
    ],
)
def test_scores_that_can_not_be_used(scored, words):
    assert words in refusal(check_scored, Given(), scored, ITEMS[:2])


@pytest.mark.parametrize("items", [[], None, [1], iter(ITEMS)])
def test_items_that_can_not_be_used(items):
    assert "evaluator Given: items(data, config) gives no" in refusal(check_items, Given(), items)
