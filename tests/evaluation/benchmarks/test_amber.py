"""AMBER's yes-or-no questions against counts by hand."""

import pytest
from bench_folders import lines, value
from refusals import refusal

from mllm_align import DataConfig
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.benchmarks.amber import AmberDiscriminative

KINDS = [
    ("generative", ["tree"]),
    ("discriminative-hallucination", "no"),
    ("discriminative-hallucination", "no"),
    ("discriminative-attribute-state", "yes"),
    ("discriminative-attribute-number", "no"),
    ("discriminative-relation", "yes"),
    ("relation", "no"),
]
NAME = "amber-discriminative"


@pytest.fixture
def folder(tmp_path):
    labels = [{"id": i, "type": kind, "truth": truth} for i, (kind, truth) in enumerate(KINDS, 1)]
    asked = [{"id": i, "image": f"AMBER_{i}.jpg", "query": f"Is it {i}?"} for i in range(1, 8)]
    value(tmp_path / "amber/annotations.json", labels)
    value(tmp_path / "amber/query_all.json", asked[::-1])
    return tmp_path / "amber"


def test_the_figures_of_a_hand_count(folder, tmp_path):
    said = {2: "No", 3: "no", 4: "Yes", 5: "No", 6: "No", 7: "Yes."}
    file = lines(tmp_path / "a.jsonl", [{"id": i, "response": text} for i, text in said.items()])
    scores = score_answers(file, folder, NAME).results["scores"]
    # right: 2, 4, 5; of three answers of No two are right; four labels are no
    assert scores["accuracy"] == 50 and scores["recall"] == pytest.approx(50)
    assert scores["precision"] == pytest.approx(200 / 3)
    assert scores["f1"] == pytest.approx(100 * 2 * 0.667 * 0.5 / (0.667 + 0.5 + 0.0001))
    assert scores["existence"] == {
        "accuracy": 50,
        "precision": 100,
        "recall": pytest.approx(50),
        "f1": pytest.approx(100 / (1.5 + 0.001)),
    }
    assert scores["attribute"]["f1"] == pytest.approx(200 / 2.0001)
    assert scores["relation"] == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}


def test_questions_and_rows(folder):
    evaluator = AmberDiscriminative()
    items = evaluator.items(folder, DataConfig())
    assert [item.record.id for item in items] == ["7", "6", "5", "4", "3", "2"]
    assert items[0].record.images[0].path == folder / "image/AMBER_7.jpg"
    assert evaluator.row(items[0], "No") == {"id": 7, "response": "No"}


def test_what_does_not_join(folder):
    read = AmberDiscriminative().items
    asked = [{"id": i, "image": "a.jpg", "query": "?"} for i in (1, 2, 3, 4, 5, 8)]
    value(folder / "query_all.json", asked)
    assert "annotations.json: 1 questions have no label: 8" in refusal(read, folder, DataConfig())
    value(folder / "query_all.json", asked[:5])
    assert "annotations.json: 2 labels are of no question: 6, 7" in refusal(read, folder, DataConfig())
    value(folder / "query_all.json", [*asked, asked[0]])
    assert "query_all.json: 1 ids come several times: 1" in refusal(read, folder, DataConfig())
    value(folder / "annotations.json", [{"id": 2, "type": "number", "truth": "yes"}])
    value(folder / "query_all.json", asked[1:2])
    assert "label 2: is 'yes' of type 'number'" in refusal(read, folder, DataConfig())
