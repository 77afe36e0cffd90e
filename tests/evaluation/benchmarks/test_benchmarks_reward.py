"""Figures of a reward model, against numpy on all pairs at once, and on a run."""

import json

import numpy as np
import pytest
from refusals import refusal
from runs import MODEL, PAIRS, bundle, compiling, reward_run

from mllm_align import evaluate, load, score
from mllm_align.data.records import Record
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.base import Item, Rewards, figures
from mllm_align.evaluation.benchmarks.reward import PairAccuracy
from mllm_align.evaluation.compare import compare
from mllm_align.evaluation.page import write_page

assert compiling and reward_run  # fixtures
FIGURES = ["accuracy", "margin", "longer_accuracy", "calibration_error", "length_correlation"]


def found(rewards, tokens):
    evaluator = PairAccuracy()
    items = [Item(Record(f"r{i}", (), (), (), "rows")) for i in range(len(rewards))]
    scored = [evaluator.score(*each) for each in zip(items, map(Rewards, rewards, tokens), strict=True)]
    return figures(evaluator, items, scored)


def test_the_figures_are_those_of_numpy():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 200, (400, 2))
    rewards = 5 + rng.normal(size=(400, 2)) * 2 + tokens / 100
    rewards[:7, 1], tokens[5:9, 1] = rewards[:7, 0], tokens[5:9, 0]
    margin, longer = rewards[:, 0] - rewards[:, 1], tokens[:, 0] - tokens[:, 1]
    right = (1 + np.sign(margin)) / 2
    sure = 1 / (1 + np.exp(-np.abs(margin)))
    bins = np.digitize(sure, np.linspace(0.5, 1, 11)[1:-1])
    gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in range(10)]
    wanted = {
        "accuracy": right.mean(),
        "margin": margin.mean(),
        "longer_accuracy": ((1 + np.sign(longer)) / 2).mean(),
        "calibration_error": sum(gaps),
        "length_correlation": np.corrcoef(rewards.ravel(), tokens.ravel())[0, 1],
    }
    ends = found(rewards, tokens)
    assert list(ends) == FIGURES and {name: each.mean for name, each in ends.items()} == pytest.approx(
        wanted
    )
    assert all(each.low < each.mean < each.high and each.n == 400 for each in ends.values())


def test_a_model_that_is_as_sure_as_it_is_right():
    """The Bradley-Terry probability of each pair decides which response is the chosen one."""
    rng = np.random.default_rng(0)
    better = np.abs(rng.normal(size=(4_000, 1))) * 2
    turned = rng.random((4_000, 1)) > 1 / (1 + np.exp(-better))
    rewards = np.where(turned, [[0, 1]], [[1, 0]]) * better
    tokens = rng.integers(3, 200, (4_000, 2))
    assert found(rewards, tokens)["calibration_error"].mean < 0.03
    assert found(rewards * 4, tokens)["calibration_error"].mean > 0.1


@pytest.mark.parametrize("rewards", [[[3.0, 3.0]] * 4, [[0.0, 0.0]] * 4])
def test_a_model_that_tells_nothing(rewards):
    ends = found(np.array(rewards), np.array([[5, 9]] * 4))
    values = {name: each.mean for name, each in ends.items()}
    assert values == dict(zip(FIGURES, (0.5, 0.0, 0.0, 0.0, 0.0), strict=True))
    assert found(np.array([[1.0, -1.0]] * 4), np.array([[7, 7]] * 4))["length_correlation"].mean == 0


def test_a_run_is_measured(reward_run, tmp_path):
    results, lines = evaluate(load(reward_run, mesh=bundle().mesh), PAIRS, "reward", out=tmp_path / "out")
    wanted = score(reward_run, PAIRS)
    for line, own in zip(lines, wanted, strict=True):
        assert line["rewards"] == pytest.approx([own["chosen_reward"], own["rejected_reward"]], abs=1e-5)
        assert line["tokens"] == [own["chosen_tokens"], own["rejected_tokens"]]
    right = np.mean([own["chosen_reward"] > own["rejected_reward"] for own in wanted])
    assert results["scores"]["accuracy"] == right and list(results["scores"]) == FIGURES
    assert results["benchmark"] == "reward" and results["intervals"]["margin"]["n"] == len(lines)
    again = evaluate(load(reward_run, mesh=bundle().mesh), PAIRS, "reward", out=tmp_path / "out")
    assert again.results == json.loads((tmp_path / "out/results.json").read_text()) == results
    same = compare(tmp_path / "out", tmp_path / "out")
    assert list(same.differences) == FIGURES and same.differences["calibration_error"].interval.mean == 0
    write_page({"reward": {"reward": again}}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "calibration_error" in page and "_gap" not in page and "_reward" not in page


def test_what_it_takes(tmp_path):
    assert f"{MODEL} is no reward model" in refusal(evaluate, bundle(), PAIRS, "reward")
    said = refusal(score_answers, tmp_path / "a.jsonl", PAIRS, "reward")
    assert said == "evaluator PairAccuracy needs rewards; give --model, not --answers"
