"""MM-Vet: how a grade is read, questions of both makers, every layout of grades."""

import pytest
from bench_folders import lines, value
from refusals import refusal

from mllm_align import DataConfig
from mllm_align.evaluation.benchmarks.mm_vet import MmVet, grade
from mllm_align.evaluation.reviews import score_reviews

NEEDED = {"v1_0": ["ocr", "math"], "v1_1": ["ocr"], "v1_2": ["rec"]}
OFFICIAL = {
    id: {"imagename": f"{id}.png", "question": f"What is {id}?", "answer": "a<AND>b", "capability": needed}
    for id, needed in NEEDED.items()
}
GRADES = {"v1_0": ["0.5", "0.7"], "v1_1": ["1.0", "1.0"], "v1_2": ["0.0", "bad"]}


@pytest.fixture
def folder(tmp_path):
    value(tmp_path / "vet/mm-vet.json", OFFICIAL)
    return tmp_path / "vet"


@pytest.mark.parametrize(
    "text, read",
    [
        ("0.5", 0.5),
        (" 1.0 |", 1),
        ("0", 0),
        ("1.1", None),
        ("-0.1", None),
        ("nan", None),
        ("0.5/1", None),
        ("Correctness: 0.5", None),
        ("", None),
    ],
)
def test_how_a_grade_is_read(text, read):
    assert grade(text) == read


def test_runs_and_capabilities(folder, tmp_path):
    found = score_reviews([value(tmp_path / "g.json", GRADES)], folder, "mm-vet").results
    assert found["scores"] == {
        "score": pytest.approx((50 + 85) / 2),
        "by_category": {
            "math": pytest.approx(60),
            "ocr": pytest.approx((75 + 85) / 2),
            "rec": 0,
        },
        "runs": pytest.approx([50, 85]),
        "std": pytest.approx(17.5),
    }
    assert found["unparsable"] == 1


def test_what_a_judge_reads(folder, tmp_path):
    item = MmVet().items(folder, DataConfig())[1]
    text = MmVet().to_judge(item, "b")
    head, last = text.split("\n\n")[1], "What is v1_1? | a <AND> b | b |"
    assert head.endswith(f"\n{last}") and head.startswith("Question | True answer | Prediction | Grade\n")
    for line in head.splitlines()[2:-1]:
        question, truth, prediction, given = line.split(" | ")
        assert question and truth and prediction and grade(given) is not None
    assert MmVet().review_key(MmVet().review(item, "0.5")) == "v1_1"
    row = {"question_id": 0, "image": "v1_0.png", "text": "What?"}
    (bare,) = MmVet().items(lines(tmp_path / "llava/llava-mm-vet.jsonl", [row]).parent, DataConfig())
    assert "has no true answer for the judge; put mm-vet.json" in refusal(MmVet().to_judge, bare, "b")


def test_every_layout_gives_the_same(folder, tmp_path):
    first = {id: grades[0] for id, grades in GRADES.items()}
    official = {id: {"model": ["judge"], "content": [g], "score": [float(g)]} for id, g in first.items()}
    scores = {id: {"score": [float(g)]} for id, g in first.items()}
    rows = [{"id": id, "content": g} for id, g in first.items()]
    numbered = [{"question_id": int(row["id"][3:]), "content": row["content"]} for row in rows]
    for content in (first, official, scores, rows, numbered):
        found = score_reviews([value(tmp_path / "g.json", content)], folder, "mm-vet").results
        assert found["scores"]["score"] == 50 and found["unparsable"] == 0


@pytest.mark.parametrize(
    "content, problem",
    [
        (GRADES | {"v1_1": ["1.0"]}, "g.json run 2: 1 of 3 questions have no verdict: v1_1"),
        (
            GRADES | {"v1_9": ["1.0", "1.0"]},
            "g.json run 1: 1 verdicts are on no question of the data: v1_9",
        ),
        (GRADES | {"v1_1": [None, "1.0"]}, "content: is missing"),
        (GRADES | {"v1_1": {"model": []}}, "content: is missing"),
        ([{"content": "0.5"}], "verdict 1: says nothing of its question ('question_id')"),
    ],
)
def test_grades_that_do_not_join(folder, tmp_path, content, problem):
    assert problem in refusal(score_reviews, [value(tmp_path / "g.json", content)], folder, "mm-vet")


def test_an_id_twice_in_an_object(folder, tmp_path):
    (tmp_path / "g.json").write_text('{"v1_0": ["0"], "v1_1": ["0"], "v1_2": ["0"], "v1_1": ["1"]}')
    said = refusal(score_reviews, [tmp_path / "g.json"], folder, "mm-vet")
    assert "g.json: 1 names come several times: v1_1; keep one of each" in said


def test_questions_and_rows(folder, tmp_path):
    evaluator = MmVet()
    item = evaluator.items(folder, DataConfig())[1]
    labels = {"question": "What is v1_1?", "answer": "a<AND>b", "capability": ["ocr"]}
    assert item.labels == labels and item.record.images[0].path == folder / "images/v1_1.png"
    row = {"question_id": 1, "prompt": "What is v1_1?", "text": "b"}
    assert evaluator.row(item, "b") == row and evaluator.key(row) == "v1_1"
    llavas = [{"question_id": i, "image": f"v1_{i}.png", "text": f"What is v1_{i}?"} for i in range(3)]
    lines(tmp_path / "other/llava-mm-vet.jsonl", llavas)
    items = evaluator.items(tmp_path / "other", DataConfig())
    assert [each.record.id for each in items] == list(OFFICIAL)
    file = value(tmp_path / "g.json", GRADES)
    scores = score_reviews([file], tmp_path / "other", "mm-vet").results["scores"]
    assert scores["by_category"] == {} and scores["score"] == pytest.approx(67.5)


def test_damaged_questions(folder, tmp_path):
    read = MmVet().items
    assert "mm-vet.json or llava-mm-vet.jsonl or" in refusal(read, tmp_path, DataConfig())
    value(folder / "mm-vet.json", {"first": OFFICIAL["v1_0"]})
    assert "question first: has no id such as v1_0" in refusal(read, folder, DataConfig())
    value(folder / "mm-vet.json", {"v1_0": OFFICIAL["v1_0"] | {"capability": ["a/b"]}})
    assert "question v1_0, capability: holds no names" in refusal(read, folder, DataConfig())
