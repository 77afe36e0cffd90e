"""MMHal-Bench: how a rating is read, its figures, answers of a model without verdicts."""

import json

import pytest
from bench_folders import lines, picture, value
from refusals import refusal
from runs import bundle, compiling

from mllm_align import DataConfig, SamplingConfig, evaluate
from mllm_align.evaluation.benchmarks.mmhal import TYPES, MmHal, MmHalV, rating
from mllm_align.evaluation.reviews import score_reviews

assert compiling  # a fixture
ASKED = [
    {
        "question_type": TYPES[i % 8],
        "image_src": f"https://example.org/{i}.jpg",
        "image_content": ["Mug"],
        "question": f"What is {i}?",
        "gt_answer": "A mug.",
        "model_answer": "",
    }
    for i in range(10)
]
SAID = [f"Explained.\nRating: {i % 7}" for i in range(8)] + ["Rating: 2, or rating: 3", "RATING: 4"]


@pytest.fixture
def folder(tmp_path):
    value(tmp_path / "hal/response_template.json", ASKED)
    return tmp_path / "hal"


@pytest.mark.parametrize(
    "text, read",
    [
        ("rating: 6", 6),
        ("Rating: 3, fair.", 3),
        ("Rating: 3. So rating: 3.", 3),
        ("Rating: 3 or rating: 4", None),
        ("Rating: 7", None),
        ("Rating: 10", None),
        ("Rating: 3.5", None),
        ("Rating 3", None),
        ("", None),
    ],
)
def test_how_a_rating_is_read(text, read):
    assert rating(text) == read


def test_the_figures_of_a_hand_count(folder, tmp_path):
    rows = [{"question_id": i, "content": text} for i, text in enumerate(SAID)]
    found = score_reviews([lines(tmp_path / "r.jsonl", rows)], folder, "mmhal")
    values = [0, 1, 2, 3, 4, 5, 6, 0, 0, 4]
    scores = found.results["scores"]
    assert scores["rating"] == sum(values) / 10 and scores["hallucination_rate"] == 0.5
    assert scores["by_type"] == dict(zip(TYPES, [0, 2.5, *values[2:8]], strict=True))
    assert found.results["unparsable"] == 1
    assert [line["rating"] for line in found.lines] == values and found.lines[8]["unparsable"]


def test_chat_completions_in_the_order_of_the_questions(folder, tmp_path):
    rows = [{"id": "chatcmpl-1", "choices": [{"message": {"content": text}}]} for text in SAID]
    file = value(tmp_path / "r.json", rows)
    found = score_reviews([file, file], folder, "mmhal").results["scores"]
    assert found["rating"] == 2.5 and found["runs"] == [2.5, 2.5] and found["std"] == 0
    short = value(tmp_path / "short.json", rows[:9])
    assert "1 of 10 questions have no verdict: 9" in refusal(score_reviews, [short], folder, "mmhal")
    empty = value(tmp_path / "empty.json", [{"choices": []}, *rows[1:]])
    assert "verdict 1, content: is missing" in refusal(score_reviews, [empty], folder, "mmhal")
    words = value(tmp_path / "words.json", SAID)
    assert "verdict 1: is 'Explained. Rating: 0'" in refusal(score_reviews, [words], folder, "mmhal")


def test_what_a_judge_reads(folder):
    item = MmHal().items(folder, DataConfig())[0]
    read, seen = MmHal().to_judge(item, "Two {mugs}."), MmHalV().to_judge(item, "Two {mugs}.")
    for text in (read, seen):
        parts = ["\nMug\n", "\nWhat is 0?\n", "\nA mug.\n", "\nTwo {mugs}.\n", "\n6: ", "\n0: "]
        places = [text.index(part) for part in parts]
        assert places == sorted(places) and text.endswith("Rating: r") and "  " not in text
    assert "You can't see the picture" in read and "You see the picture" in seen
    assert (MmHal.judge_sees, MmHalV.judge_sees) == (False, True)
    row = MmHal().review(item, "Rating: 5")
    assert MmHal().review_key(row) == "0" and row["content"] == "Rating: 5"


def test_damaged_questions(folder):
    value(folder / "response_template.json", ASKED[::-1])
    said = refusal(MmHal().items, folder, DataConfig())
    assert "question 0, question_type: is 'adversarial' where 'attribute' belongs" in said


def test_a_model_answers_and_nothing_is_scored(tmp_path, compiling):
    for i in range(2):
        picture(tmp_path / f"hal/images/{i}.jpg")
    value(tmp_path / "hal/questions.json", ASKED[:2])
    evaluator = MmHal(sampling=SamplingConfig(temperature=0.0, max_tokens=4))
    found = evaluate(bundle(), tmp_path / "hal", evaluator, out=tmp_path / "out", batch_size=2)
    assert found.results["scores"] == {} and found.results["n"] == 2 and "judge" not in found.results
    row = json.loads((tmp_path / "out/answers.jsonl").read_text().splitlines()[1])
    assert row["question"] == "What is 1?" and row["question_type"] == "adversarial"
    assert isinstance(row["model_answer"], str) and row["image_content"] == ["Mug"]
