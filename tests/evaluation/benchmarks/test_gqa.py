"""GQA: answers equal the label or do not."""

import pytest
from bench_folders import lines, value
from refusals import refusal

from mllm_align import DataConfig
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.benchmarks.gqa import Gqa, read


@pytest.fixture
def folder(tmp_path):
    def row(answer):
        return {"imageId": "n1", "question": f"Is it {answer}?", "answer": answer}

    rows = {str(id): row(answer) for id, answer in ((4, "red"), (5, "left"), (6, "no"))}
    value(tmp_path / "gqa/data/testdev_balanced_questions.json", rows)
    return tmp_path / "gqa"


@pytest.mark.parametrize(
    "text, wanted",
    [("Red", "red"), (" red. ", "red"), ("red..", "red."), ("red .", "red "), ("The red.", "the red")],
)
def test_how_an_answer_is_read(text, wanted):
    assert read(text) == wanted


def test_the_accuracy_in_percent(folder, tmp_path):
    said = {"4": "Red.", "5": "the left", "6": "No"}
    rows = [{"question_id": id, "text": text} for id, text in said.items()]
    found = score_answers(lines(tmp_path / "a.jsonl", rows), folder, "gqa")
    assert found.results["scores"] == {"accuracy": pytest.approx(200 / 3)}
    assert [line["right"] for line in found.lines] == [True, False, True]


def test_lmms_eval_takes_punctuation_out(folder, tmp_path):
    value(
        folder / "data/testdev_balanced_questions.json",
        {"4": {"imageId": "n1", "question": "What?", "answer": "t-shirt"}},
    )
    for text, right in (("T-shirt..", True), ("tshirt", True), ("t shirt", False)):
        file = lines(tmp_path / "a.jsonl", [{"question_id": "4", "text": text}])
        assert score_answers(file, folder, Gqa(preset="lmms-eval")).lines[0]["right"] is right
        assert score_answers(file, folder, "gqa").lines[0]["right"] is False


def test_questions_as_published(folder):
    item = Gqa().items(folder, DataConfig())[0]
    text = item.record.messages[-1].text
    assert text == "Is it red?\nAnswer the question using a single word or phrase."
    assert item.record.images[0].path == folder / "images" / "n1.jpg"
    assert Gqa().row(item, "red") == {"question_id": "4", "prompt": text, "text": "red"}
    (folder / "data/testdev_balanced_questions.json").write_text('{"4": {"question": "x", "imageId": 5}}')
    assert "question 4, imageId: is a int; get the file again" in refusal(Gqa().items, folder, DataConfig())
