"""Pairs of results: differences against a naive bootstrap, and the sentence that says what they tell."""

from dataclasses import dataclass

import numpy as np
import pytest
from bench_folders import lines, pope
from judges import record
from refusals import refusal

from mllm_align import Evaluator, Item, Scored
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.base import EVALUATORS
from mllm_align.evaluation.compare import Comparison, Difference, compare, flat_intervals, read_evaluation
from mllm_align.evaluation.intervals import Interval
from mllm_align.evaluation.reviews import score_reviews

COUNT = 40


@dataclass(frozen=True)
class Marks(Evaluator):
    """An answer is two numbers: right things and wrong ones of it."""

    ways = {"wrong": -1, "length": 0}
    partial = True

    def group(self, item):
        return item.record.id.partition("-")[0]

    def score(self, item, answer):
        right, wrong = map(int, answer.split())
        figures = {"right": right, "wrong": (wrong, right + wrong), "length": len(answer)}
        return Scored(figures | {f"by/{item.record.id[-1]}": right})


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """As if a user's file had them."""
    monkeypatch.setattr(type(EVALUATORS), "find", lambda self, name: self.get(name, Marks))


ITEMS = [Item(record(f"{i // 2}-{'ab'[i % 2]}", images=0)) for i in range(COUNT)]


def of(answers, tmp_path, name="a", items=ITEMS, **more):
    rows = [{"id": item.record.id, "response": text} for item, text in zip(items, answers, strict=True)]
    return score_answers(lines(tmp_path / f"{name}.jsonl", rows), ITEMS, Marks(), **more)


def drawn(seed, better=0):
    rng = np.random.default_rng(seed)
    return [f"{rng.integers(5) + better} {rng.integers(1, 5)}" for _ in range(COUNT)]


def test_a_difference_is_that_of_a_naive_paired_bootstrap(tmp_path):
    texts = drawn(0), drawn(1)
    found = compare(*(of(each, tmp_path) for each in texts))
    values = np.array([[list(map(int, text.split())) for text in each] for each in texts], float)
    groups = values.reshape(2, COUNT // 2, 2, 2).sum(2)  # two records each
    picks = np.random.default_rng(0).integers(COUNT // 2, size=(1000, COUNT // 2))

    def share(pairs):
        return pairs[..., 1].sum(-1) / pairs.sum((-2, -1))

    wrong = np.array([share(groups[1][pick]) - share(groups[0][pick]) for pick in picks])
    each = found.differences["wrong"]
    assert (each.first, each.second) == (pytest.approx(share(groups[0])), pytest.approx(share(groups[1])))
    assert each.interval.mean == pytest.approx(each.second - each.first)
    ends = [each.interval.low, each.interval.high]
    assert ends == pytest.approx(np.quantile(wrong, [0.025, 0.975]), abs=1e-9)
    assert (each.interval.n, found.records, found.differences["by/a"].interval.n) == (20, 40, 20)
    assert list(found.headlines) == ["right", "wrong", "length"]
    swapped = compare(of(texts[1], tmp_path), of(texts[0], tmp_path)).differences["wrong"]
    assert (swapped.interval.low, swapped.interval.high) == pytest.approx((-ends[1], -ends[0]))


def test_what_a_sure_difference_says(tmp_path):
    first, second = of(drawn(0), tmp_path), of(drawn(0, better=2), tmp_path)
    found = compare(first, second, ("old", "new"))
    right, wrong = found.differences["right"], found.differences["wrong"]
    ends = right.interval.low, right.interval.high
    assert ends == pytest.approx((2, 2))  # each answer gained two
    assert (right.verdict, wrong.verdict, found.differences["length"].verdict) == (1, 1, 0)
    said = f"new is better than old (right {right.words}; wrong {wrong.words})."
    assert found.sentence == f"Marks: {said}"
    back = compare(second, first, ("new", "old"))
    assert back.differences["right"].verdict == back.differences["wrong"].verdict == -1
    assert "old is worse than new (right" in back.sentence


def test_equal_answers_cant_be_told_apart(tmp_path):
    found = compare(of(drawn(0), tmp_path), of(drawn(0), tmp_path), ("A", "B"))
    assert "whether B is better than A can't be told (right 2.02 against 2.02, +0.00" in found.sentence


def sentence(**verdicts):
    made = {
        name: Difference(10.0, 10.0 + sum(ends) / 2, Interval(sum(ends) / 2, *ends, 9), way)
        for name, (ends, way) in verdicts.items()
    }
    return Comparison("b", ("A", "B"), made, 9, (1, 2), ("prompt",)).sentence


def test_mixed_outcomes_are_told_one_by_one():
    said = sentence(chair_i=((-4, -2), -1), recall=((-3, -1), 1), f=((-1, 2), 1), words=((5, 7), 0))
    assert said == (
        "b: B is better than A (chair_i 7.00 against 10.00, -3.00 (-4.00 to -2.00)); "
        "B is worse than A (recall 8.00 against 10.00, -2.00 (-3.00 to -1.00)); "
        "can't be told: f 10.5 against 10.0, +0.5 (-1.0 to 2.0). "
        "3 records that one of them lacks are left out. Settings differ: prompt."
    )


def test_one_question_tells_nothing(tmp_path):
    one = [Item(record("0-a", images=0))]
    pair = [of([text], tmp_path, items=one) for text in ("1 1", "9 1")]
    found = compare(*pair).differences["right"]
    assert found.verdict == 0 and found.words == "9.00 against 1.00, +8.00"


def test_records_of_one_alone_are_left_out_and_counted(tmp_path):
    texts = drawn(0)
    whole, few = of(texts, tmp_path), of(texts[:-5], tmp_path, "few", ITEMS[:-5])
    found = compare(whole, few)
    assert (found.records, found.alone) == (35, (5, 0))
    assert "5 records that one of them lacks" in found.sentence
    assert found.differences["right"].first == found.differences["right"].second


def test_folders_are_read_and_others_refused(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    made = [of(drawn(i), tmp_path, out=folder) for i, folder in enumerate(folders)]
    assert compare(*folders) == compare(*made)
    assert read_evaluation(folders[0]) == made[0]
    flat = flat_intervals(made[0].results["intervals"])
    assert list(flat) == ["right", "wrong", "length", "by/a", "by/b"] and flat["by/a"].n == 20
    assert "results.json: can't be read" in refusal(compare, folders[0], tmp_path)
    (folders[1] / "answers.jsonl").write_text('{"figures": {}}\n')
    assert "does not say what its records are; evaluate again" in refusal(compare, *folders)


def test_answers_stand_beside_the_verdicts_on_them(tmp_path):
    made = of(drawn(0), tmp_path, out=tmp_path / "one")
    verdicts = [
        {"content": f"Grade {i}.", "figures": {"right": [1, 1]}, "record": line["record"]}
        for i, line in enumerate(made.lines)
    ]
    lines(tmp_path / "one/reviews.jsonl", verdicts)
    found = read_evaluation(tmp_path / "one").lines[3]
    assert (found["content"], found["response"]) == ("Grade 3.", made.lines[3]["response"])
    assert found["figures"] == {"right": [1, 1]}


def test_other_questions_and_benchmarks_are_refused(tmp_path):
    one = of(drawn(0), tmp_path)
    other = one._replace(
        lines=[line | {"record": line["record"] | {"question": "?"}} for line in one.lines]
    )
    said = refusal(compare, one, other)
    assert "the second: 40 records are other questions than those of the first: 0-a, 0-b" in said
    names = one._replace(lines=[line | {"record": line["record"] | {"id": "z"}} for line in one.lines])
    assert "has no record that the first has" in refusal(compare, one, names)
    theirs = one._replace(results=one.results | {"benchmark": "pope"})
    assert "the second: is of pope, and the first of" in refusal(compare, one, theirs)


def test_figures_made_of_others(tmp_path):
    folder = pope(tmp_path / "pope")
    answers = [[{"question_id": 10 + i, "text": text} for i in range(7)] for text in ("Yes", "No")]
    yes, no = (score_answers(lines(tmp_path / "a.jsonl", rows), folder, "pope") for rows in answers)
    found = compare(yes, no)
    mean = found.differences["mean_accuracy"]
    assert (mean.first, mean.second) == (yes.results["scores"]["mean_accuracy"], 4 / 9)
    assert list(found.headlines) == ["mean_accuracy", "mean_f1"]
    assert found.differences["random/yes_ratio"].way == 0
    assert found.differences["mean_f1"].interval.n == 7


def test_runs_of_a_judge_are_averaged(tmp_path):
    asked = [{"question_id": i, "image": "a", "text": "?", "category": "conv"} for i in range(3)]
    folder = lines(tmp_path / "wild/questions.jsonl", asked).parent

    def judged(*runs):
        files = [
            lines(tmp_path / f"{n}.jsonl", [{"question_id": i, "content": text} for i in range(3)])
            for n, text in enumerate(runs)
        ]
        return score_reviews(files, folder, "llava-wild")

    found = compare(judged("10 5", "10 7"), judged("10 9")).differences["score"]
    assert (found.first, found.second) == (pytest.approx(60), pytest.approx(90))
    assert (found.interval.low, found.interval.high) == pytest.approx((30, 30)) and found.verdict == 1
