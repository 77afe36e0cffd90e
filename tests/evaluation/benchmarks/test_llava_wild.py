"""LLaVA-Bench in the wild: how a verdict is read, the questions; the published figures where they are."""

import pytest
from bench_folders import lines
from refusals import refusal

from mllm_align import DataConfig
from mllm_align.evaluation.benchmarks.llava_wild import LlavaWild, scores
from mllm_align.evaluation.reviews import score_reviews

ROW = {"question_id": 3, "image": "003.jpg", "text": "What is it?", "category": "conv"}


@pytest.mark.parametrize(
    "text, read",
    [
        ("8 9\nBoth are good: 1 1.", (8, 9)),
        ("8,9", (8, 9)),
        ("8, 9.5 ", (8, 9.5)),
        ("10 1\r\nBrief.", (10, 1)),
        ("8", None),
        ("8 9 7", None),
        ("8/10 9/10", None),
        ("Scores: 8 9", None),
        ("\n8 9", None),
        ("0 9", None),
        ("8 11", None),
        ("nan 5", None),
        ("", None),
    ],
)
def test_the_first_line_of_a_verdict(text, read):
    assert scores(text) == read


def test_questions_and_rows(tmp_path):
    lines(tmp_path / "questions.jsonl", [ROW])
    evaluator = LlavaWild()
    (item,) = evaluator.items(tmp_path, DataConfig())
    assert item.record.messages[-1].text == "What is it?"
    assert item.record.images[0].path == tmp_path / "images/003.jpg"
    assert item.labels == {"question": "What is it?", "category": "llava_bench_conv"}
    row = {"question_id": 3, "prompt": "What is it?", "text": "A mug."}
    assert evaluator.row(item, "A mug.") == row


def test_what_a_judge_reads(tmp_path):
    lines(tmp_path / "questions.jsonl", [ROW])
    (bare,) = LlavaWild().items(tmp_path, DataConfig())
    assert "row 1: has no reference for the judge; put answers_gpt4.jsonl beside" in refusal(
        LlavaWild().to_judge, bare, "A mug."
    )
    lines(tmp_path / "answers_gpt4.jsonl", [{"question_id": 3, "text": "A {cup}.", "answer_id": "z"}])
    (bare,) = LlavaWild().items(tmp_path, DataConfig())
    assert "has no caption for the judge; put context.jsonl" in refusal(
        LlavaWild().to_judge, bare, "A mug."
    )
    lines(tmp_path / "context.jsonl", [{"id": "003", "image": "003.jpg", "caption": ["Blue.", "Round."]}])
    (item,) = LlavaWild().items(tmp_path, DataConfig())
    text = LlavaWild().to_judge(item, "A {mug}.")
    parts = ["[Description]\nBlue.\nRound.\n", "[Question]\nWhat is it?\n", "[Assistant 1]\nA {cup}.\n"]
    places = [text.index(part) for part in [*parts, "[Assistant 2]\nA {mug}.\n", "two numbers"]]
    assert places == sorted(places)
    said = LlavaWild().review(item, "8 9")
    assert said == {"question_id": 3, "category": "llava_bench_conv", "content": "8 9"}
    lines(tmp_path / "answers_gpt4.jsonl", [{"question_id": 3, "text": "A cup."}] * 2)
    doubled = refusal(LlavaWild().items, tmp_path, DataConfig())
    assert "answers_gpt4.jsonl: 1 ids come several times: 3" in doubled


def test_without_questions_the_verdicts_name_the_categories(tmp_path):
    kinds = ["llava_bench_conv", "llava_bench_detail", "llava_bench_complex"]
    rows = [{"question_id": i, "category": kinds[i % 3], "content": "5 4"} for i in range(60)]
    found = score_reviews([lines(tmp_path / "r.jsonl", rows)], tmp_path, "llava-wild").results
    assert found["scores"] == {"score": 80, "by_category": dict.fromkeys(kinds, 80)}
    assert found["intervals"]["by_category"]["llava_bench_detail"]["n"] == 20
    other = [rows[0] | {"category": kinds[1]}, *rows[1:]]
    files = [tmp_path / "r.jsonl", lines(tmp_path / "other.jsonl", other)]
    problem = "other.jsonl: 1 verdicts are on other questions of the same ids: 0"
    assert problem in refusal(score_reviews, files, tmp_path, "llava-wild")
    few = [lines(tmp_path / "few.jsonl", rows[:58])]
    problem = "few.jsonl: 2 of 60 questions have no verdict: 58, 59"
    assert problem in refusal(score_reviews, few, tmp_path, "llava-wild")


def test_damaged_questions(tmp_path):
    read = LlavaWild().items
    assert "questions.jsonl is missing; put it there" in refusal(read, tmp_path, DataConfig())
    lines(tmp_path / "questions.jsonl", [ROW, ROW])
    assert "1 ids come several times: 3" in refusal(read, tmp_path, DataConfig())
    lines(tmp_path / "questions.jsonl", [ROW | {"category": "essay"}])
    assert "row 1, category: is 'llava_bench_essay'; it must be" in refusal(read, tmp_path, DataConfig())
    assert "evaluator.prompt is 'x'" in refusal(LlavaWild, prompt="x")
