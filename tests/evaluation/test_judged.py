"""The protocol of benchmarks that a judge scores: defaults of a benchmark of one's own."""

from dataclasses import dataclass

import pytest
from bench_folders import lines
from judges import record
from refusals import refusal

from mllm_align import Item, Scored
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.judged import Judged
from mllm_align.evaluation.reviews import score_reviews


@dataclass(frozen=True)
class Marks(Judged):
    def verdict(self, item, text):
        return Scored({"score": float(text)})


ITEMS = [Item(record(name, images=0)) for name in "ab"]


def test_a_benchmark_of_ones_own_says_how_a_verdict_is_read(tmp_path):
    file = lines(tmp_path / "r.jsonl", [{"question_id": n, "content": m} for n, m in ("a2", "b5")])
    found = score_reviews([file], ITEMS, Marks()).results
    assert found["scores"] == {"score": 3.5, "by_category": {}} and found["unparsable"] == 0


def test_an_answer_alone_has_no_score(tmp_path):
    assert Marks().score(ITEMS[0], "Yes") == Scored({})
    said = refusal(score_answers, tmp_path / "a.jsonl", ITEMS, Marks())
    assert said.startswith(
        "evaluator Marks scores a judge's verdicts on answers; name one with --judge.url"
    )
    with pytest.raises(NotImplementedError):
        Judged().verdict(ITEMS[0], "5")
