"""The quickstart's figures, from made-up counts."""

import json
from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")

from mllm_align.evaluation.intervals import over_seeds
from mllm_align.testbed.hallucination import Counts
from mllm_align.testbed.quickstart.results import figures, summary, verdict


def measure(wrong, images=40, recalled=2, right=0.75):
    """A model that names four things in each picture, `wrong` of them in all not there."""
    counts = [
        Counts(
            captions=1,
            mentions=4,
            hallucinated=int(i < wrong),
            with_hallucination=int(i < wrong),
            present=3,
            recalled=recalled,
            sentences=2,
            words=20,
        )
        for i in range(images)
    ]
    pope = [("random", i < 2 * right * images) for i in range(2 * images)]
    pope += [("adversarial", i < right * images) for i in range(images)]
    return {"captions": ["A cup."] * images, "counts": [asdict(c) for c in counts], "pope": pope}


def measured(sft=20, control=16, aligned=4, pairs=10):
    wrong = {"sft": sft, "sft_control": control, "aligned": aligned}
    models = {
        name: {"broken": measure(n), "unbiased": measure(n // 2), "held_out": measure(n // 4)}
        for name, n in wrong.items()
    }
    for splits in models.values():
        del splits["held_out"]["pope"]  # asked on one split or more
    return {
        "models": models,
        "pairs": {"pairs": pairs, "differ_after": [0.5, pairs / 20]},
    }


def test_figures_of_a_model():
    found = figures(measure(8))
    assert {"mean", "low", "high", "n"} == set(found["chair_i"])
    assert found["chair_i"]["mean"] == pytest.approx(8 / 160) and found["chair_i"]["n"] == 40
    assert found["chair_s"]["mean"] == pytest.approx(8 / 40)
    assert found["recall"]["mean"] == pytest.approx(2 / 3)
    assert found["words"]["mean"] == 20
    assert found["pope_accuracy"] == pytest.approx({**found["pope_accuracy"], "mean": 0.75, "n": 120})
    assert (found["pope_random"]["n"], found["pope_adversarial"]["n"]) == (80, 40)
    assert "pope_popular" not in found
    for name in ("chair_i", "chair_s", "pope_accuracy"):
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"]


def test_figures_are_the_same_from_json():
    assert figures(json.loads(json.dumps(measure(8)))) == figures(measure(8))


def test_summary_of_one_seed_has_intervals_over_images():
    one = measured()
    results = summary([one], 0.99)
    assert (results["seeds"], results["split"]) == ([0], "broken")
    assert results["interval"] == "95% bootstrap over images"
    for name in ("sft", "sft_control", "aligned"):
        assert results[name] == figures(one["models"][name]["broken"])
        assert results["other_splits"]["unbiased"][name] == figures(one["models"][name]["unbiased"])
        held_out = results["other_splits"]["held_out"][name]
        assert held_out == figures(one["models"][name]["held_out"])
        assert "chair_i" in held_out and "pope_accuracy" not in held_out
    assert results["pairs"] == {"count": 10, "differ_after_iteration": {"0.99": [0.5, 0.5]}}
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_summary_of_three_seeds_has_intervals_over_seeds():
    seeds = [measured(20, 16, 4), measured(24, 20, 8, pairs=12), measured(16, 18, 6, pairs=14)]
    results = summary(seeds, 1.0)
    assert results["seeds"] == [0, 1, 2]
    assert results["interval"] == "95% Student t over 3 seeds"
    assert results["sft"]["chair_i"] == over_seeds([20 / 160, 24 / 160, 16 / 160]).to_json()
    assert results["aligned"]["chair_s"]["mean"] == pytest.approx(np.mean([4, 8, 6]) / 40)
    assert results["other_splits"]["unbiased"]["sft_control"]["chair_i"]["n"] == 3
    assert results["pairs"]["count"] == 36
    assert results["pairs"]["differ_after_iteration"] == {"1": pytest.approx([0.5, 0.6])}


ENDS = ("mean", "low", "high")
OTHERWISE_FINE = "Nothing else that was measured got clearly worse."


def shown(sft, control, aligned, recall=(0.7, 0.7), **others):
    """Results with these intervals of CHAIR_i; `others`: those of another figure for the three models."""

    def interval(mean, half=0.0):
        return {"mean": mean, "low": mean - half, "high": mean + half, "n": 300}

    models = {
        name: {"chair_i": interval(*value)}
        for name, value in (("sft", sft), ("sft_control", control), ("aligned", aligned))
    }
    models["sft"]["recall"], models["aligned"]["recall"] = (interval(each, 0.04) for each in recall)
    for key, values in others.items():
        for model, value in zip(models.values(), values, strict=True):
            model[key] = interval(*value)
    return models


def test_verdict_of_a_clear_effect():
    assert verdict(shown((0.3, 0.03), (0.25, 0.03), (0.1, 0.02))) == [
        "Fewer hallucinated things than the SFT model: CHAIR_i from 30.0% to 10.0%; intervals do not "
        "overlap.",
        OTHERWISE_FINE,
        "Fewer hallucinated things than as many further steps of SFT: CHAIR_i from 25.0% to 10.0%; "
        "intervals do not overlap.",
        "Recall is the same.",
    ]


def test_verdict_says_where_the_control_does_as_well():
    clear, _, unclear, _ = verdict(shown((0.3, 0.03), (0.12, 0.03), (0.1, 0.02)))
    assert clear.startswith("Fewer hallucinated things than the SFT model")
    assert unclear == (
        "No clear effect against as many further steps of SFT: CHAIR_i from 12.0% to 10.0%, and the "
        "intervals overlap."
    )


def test_verdict_hides_no_harm():
    worse, _, unclear, _ = verdict(shown((0.1, 0.02), (0.28, 0.03), (0.3, 0.03)))
    assert worse == (
        "More hallucinated things than the SFT model: CHAIR_i from 10.0% to 30.0%; intervals do not "
        "overlap."
    )
    assert unclear.startswith("No clear effect against as many further steps of SFT")


CLEAR = ((0.3, 0.03), (0.25, 0.03), (0.1, 0.02))


def test_verdict_says_what_else_got_worse():
    unparsed, place = [(0.0, 0.0), (0.0, 0.0), (0.052, 0.02)], [(0.1, 0.02), (0.1, 0.02), (0.15, 0.02)]
    found = verdict(shown(*CLEAR, unparsed=unparsed, place_error=place))
    assert found[1] == (
        "Worse than the SFT model: place errors from 10.0% to 15.0%; sentences not understood from 0.0% to "
        "5.2%."
    )
    found = verdict(shown(*CLEAR, unparsed=[(0.01, 0.01), (0.0, 0.0), (0.02, 0.02)], words=[(9, 1)] * 3))
    assert found[1] == OTHERWISE_FINE
    found = verdict(shown(*CLEAR, unparsed=[(0.001, 0.003), (0.0, 0.0), (0.077, 0.09)], place_error=place))
    assert found[1] == (
        "Worse than the SFT model: place errors from 10.0% to 15.0%. Perhaps worse (intervals overlap): "
        "sentences not understood from 0.1% to 7.7%."
    )


def test_verdict_says_recall_once():
    found = verdict(shown(*CLEAR, recall=(0.7, 0.6)))
    assert [each for each in found if "ecall" in each] == [
        "Worse than the SFT model: recall from 70.0% to 60.0%."
    ]


def test_verdict_says_what_is_at_chance():
    pope, relation = [(0.5, 0.02), (0.51, 0.02), (0.495, 0.02)], [(0.7, 0.055), (0.74, 0.03), (0.76, 0.04)]
    found = verdict(shown(*CLEAR, pope_accuracy=pope, relation_error=relation))
    assert found[-1] == "At chance before and after: POPE (49.5%) and relation errors (76.0%)."
    assert found[1] == OTHERWISE_FINE, "relation errors from 70% to 76%, both at chance, are no harm"
    found = verdict(shown(*CLEAR, pope_accuracy=pope, relation_error=[*relation[:2], (0.3, 0.04)]))
    assert found[-1] == "At chance before and after: POPE (49.5%)."


def test_verdict_says_what_answers_tell():
    """Of sight, of the bias, of alignment; nothing if they are those of a guess."""

    def answers(fair, *broken):
        results = shown(*CLEAR, pope_accuracy=broken)
        results["other_splits"] = {
            "unbiased": {"sft": {"pope_accuracy": dict(zip(ENDS, fair, strict=True))}}
        }
        return verdict(results)[4:]

    fair, broken = (0.882, 0.862, 0.9), (0.8, 0.02)
    assert answers(fair, broken, broken, (0.85, 0.02)) == [
        "Asked whether a thing is there (POPE), the SFT model is right in 88.2% [86.2, 90.0] on unbiased "
        "pictures and 80.0% [78.0, 82.0] on bias-breaking ones: it looks at the picture, and the bias "
        "lowers its answers.",
        "After alignment it is right in 85.0% [83.0, 87.0] on bias-breaking ones: better.",
    ]
    unclear, after = answers(fair, (0.87, 0.02), broken, (0.82, 0.02))
    assert unclear.endswith("and the bias does not clearly lower its answers.") and after.endswith("worse.")
    assert answers(fair, broken, broken, (0.81, 0.02))[1].endswith("no clear change.")
    assert not answers((0.51, 0.49, 0.53), broken, broken, broken)


@pytest.mark.parametrize(
    ("recall", "said"),
    [
        ((0.7, 0.67), "Recall is lower by 3.0 points."),
        ((0.7, 0.712), "Recall is higher by 1.2 points."),
        ((0.7, 0.6999), "Recall is the same."),
    ],
)
def test_verdict_on_recall(recall, said):
    assert verdict(shown((0.3, 0.03), (0.25, 0.03), (0.1, 0.02), recall))[-1] == said
