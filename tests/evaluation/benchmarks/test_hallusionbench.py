"""HallusionBench: figures of hand counts, by words and by verdicts; questions without a picture."""

import json

import pytest
from bench_folders import lines, picture, value
from refusals import refusal
from runs import bundle, compiling

from mllm_align import DataConfig, SamplingConfig, evaluate
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.benchmarks.hallusionbench import HallusionBench, reading, yes_or_no
from mllm_align.evaluation.reviews import score_reviews

assert compiling  # a fixture


def asked(category, figure, question, visual, right):
    file = None if visual == "0" else f"./{category}/map/0_{figure}.png"
    return {
        "category": category,
        "subcategory": "map",
        "visual_input": visual,
        "set_id": "0",
        "figure_id": figure,
        "sample_note": "town",
        "question_id": question,
        "question": f"Is {question} a town?",
        "gt_answer_details": "It is." if right == "1" else "It is a lake.",
        "gt_answer": right,
        "filename": file,
    }


# Two questions each: without a picture, on one, on its edited copy; and on a picture and its edited copy.
ROWS = [
    *(asked("VS", "0", q, "0", right) for q, right in (("0", "1"), ("1", "0"))),
    *(asked("VS", "1", q, "1", right) for q, right in (("0", "1"), ("1", "0"))),
    *(asked("VS", "2", q, "2", right) for q, right in (("0", "0"), ("1", "1"))),
    *(asked("VD", "0", q, "1", right) for q, right in (("0", "1"), ("1", "0"))),
    *(asked("VD", "1", q, "2", right) for q, right in (("0", "0"), ("1", "1"))),
]
IDS = [
    "_".join(r[n] for n in ("category", "subcategory", "set_id", "figure_id", "question_id")) for r in ROWS
]


@pytest.fixture
def folder(tmp_path):
    value(tmp_path / "hb/HallusionBench.json", ROWS)
    return tmp_path / "hb"


@pytest.mark.parametrize(
    "text, read",
    [
        ("Yes", True),
        ("Yes, it is.", True),
        ("The answer is: no!", False),
        ("I know nothing.", None),
        ("Yes and no.", None),
        ("", None),
    ],
)
def test_an_answer_is_read_by_its_words(text, read):
    assert yes_or_no(text) is read


@pytest.mark.parametrize(
    "text, read",
    [
        ("correct", "correct"),
        ("“Incorrect”.", "incorrect"),
        ("Unclear: it says nothing", "unclear"),
        ("correct, as the reference is correct", "correct"),
        ("Correct or unclear", None),
        ("The prediction is correct", None),
        ("not correct", None),
        ("", None),
    ],
)
def test_how_a_verdict_is_read(text, read):
    assert reading(text) == read


def test_questions_with_and_without_a_picture(folder):
    items = HallusionBench().items(folder, DataConfig())
    assert [item.record.id for item in items] == IDS
    assert [len(item.record.images) for item in items] == [0, 0, *[1] * 8]
    assert items[0].record.messages[0].places == 0 and items[0].record.messages[0].text == "Is 0 a town?"
    assert items[4].record.images[0].path == folder / "hallusion_bench/VS/map/0_2.png"
    picture(folder / "VS/map/0_2.png")
    assert (
        HallusionBench().items(folder, DataConfig())[4].record.images[0].path == folder / "VS/map/0_2.png"
    )


GIVEN = ["Yes.", "I can't tell.", "Yes", "No", "No, a lake.", "No", "Yes", "No", "No", "Yes"]


def test_figures_by_words(folder, tmp_path):
    rows = [row | {"model_prediction": text} for row, text in zip(ROWS, GIVEN, strict=True)]
    found = score_answers(value(tmp_path / "a.json", rows), folder, "hallusionbench")
    # wrong: the second (VS, no picture) and the sixth (VS, edited)
    assert found.results["scores"] == {
        "aAcc": pytest.approx(80),
        "qAcc": 75,
        "fAcc": 75,
        "easy": 75,
        "hard": 75,
        "by_category": {"VS": pytest.approx(400 / 6), "VD": 100},
        "with_image": {"aAcc": pytest.approx(87.5), "qAcc": 75},
    }
    assert found.results["intervals"]["aAcc"]["n"] == 2
    assert [line["answer"] for line in found.lines[:3]] == ["yes", "neither", "yes"]


SAID = [
    "correct",
    "unclear",
    "correct",
    "correct",
    "incorrect",
    "correct",
    "correct",
    "unclear",
    "?",
    "correct",
]


def test_figures_by_verdicts(folder, tmp_path):
    items = HallusionBench().items(folder, DataConfig())
    rows = [HallusionBench().review(item, text) for item, text in zip(items, SAID, strict=True)]
    found = score_reviews([lines(tmp_path / "r.jsonl", rows)], folder, "hallusionbench")
    # the fifth is wrong (VS, edited), the eighth (VD), and the ninth can't be read
    assert found.results["scores"] == {
        "aAcc": pytest.approx(700 / 9),
        "qAcc": pytest.approx(100 / 3),
        "fAcc": pytest.approx(100 / 3),
        "easy": 75,
        "hard": pytest.approx(200 / 3),
        "by_category": {"VS": pytest.approx(500 / 6), "VD": pytest.approx(200 / 3)},
        "with_image": {"aAcc": pytest.approx(500 / 7), "qAcc": pytest.approx(100 / 3)},
    }
    assert found.results["unparsable"] == 1
    assert [line["gpt4v_output_gpt_check"] for line in found.lines[7:]] == ["2", None, "1"]


def test_what_the_published_program_writes(folder, tmp_path):
    codes = ["1", "2", "1", "1", "0", "1", "1", "2", "0", "1"]
    rows = [
        row | {"model_prediction": "Yes", "gpt4v_output_gpt_check": code}
        for row, code in zip(ROWS, codes, strict=True)
    ]
    found = score_reviews([value(tmp_path / "r.json", rows)], folder, "hallusionbench").results
    assert found["scores"]["aAcc"] == pytest.approx(70) and found["scores"]["qAcc"] == 25
    half = [row for row in rows if row["category"] == "VD"]
    line = refusal(score_reviews, [value(tmp_path / "vd.json", half)], folder, "hallusionbench")
    assert "6 of 10 questions have no verdict: VS_map_0_0_0" in line


def test_damaged_questions(folder):
    value(folder / "HallusionBench.json", [ROWS[0] | {"gt_answer": "2"}])
    line = refusal(HallusionBench().items, folder, DataConfig())
    assert "question 0: has gt_answer '2' and visual_input '0'; get the file again" in line
    value(folder / "HallusionBench.json", [*ROWS, ROWS[1]])
    line = refusal(HallusionBench().items, folder, DataConfig())
    assert "1 ids come several times: VS_map_0_0_1" in line
    value(folder / "HallusionBench.json", [ROWS[2] | {"filename": None}])
    assert "question 0, filename: is missing" in refusal(HallusionBench().items, folder, DataConfig())


def test_a_model_is_asked_with_and_without_a_picture(folder, tmp_path, compiling):
    value(folder / "HallusionBench.json", ROWS[1:3])
    picture(folder / "hallusion_bench/VS/map/0_1.png")
    evaluator = HallusionBench(sampling=SamplingConfig(temperature=0.0, max_tokens=2))
    found = evaluate(bundle(), folder, evaluator, out=tmp_path / "out", batch_size=2)
    assert found.results["n"] == 2 and set(found.results["scores"]) >= {"aAcc", "qAcc", "fAcc"}
    texts = [line["model_prediction"] for line in found.lines]
    again = score_answers(tmp_path / "out/answers.jsonl", folder, evaluator)
    assert again.results["scores"] == found.results["scores"]
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [row["model_prediction"] for row in rows] == texts and rows[0]["gt_answer"] == "0"
