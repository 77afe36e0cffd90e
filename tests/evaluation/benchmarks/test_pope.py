"""POPE against counts by hand; how an answer is read; labels that do not join."""

import json

import pytest
from bench_folders import KITCHEN, STREET, lines, pope
from refusals import refusal
from runs import bundle, compiling

from mllm_align import DataConfig, SamplingConfig, evaluate
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.benchmarks.pope import Pope, yes

assert compiling  # a fixture
SAID = ["Yes", "Yes.", "no", "Yes", "No", "Yes", "yes, it is"]  # in the order of the questions


@pytest.fixture
def folder(tmp_path):
    return pope(tmp_path / "pope")


@pytest.fixture
def answers(tmp_path):
    rows = [{"question_id": 10 + i, "text": text} for i, text in enumerate(SAID)]
    return lines(tmp_path / "answers.jsonl", rows[::-1])


def test_the_figures_of_a_hand_count(folder, answers):
    found = score_answers(answers, folder, "pope").results
    # random: yes to kettle (yes) and zebra (no), no to tram (yes)
    assert found["scores"]["random"] == {
        "accuracy": pytest.approx(1 / 3),
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "yes_ratio": pytest.approx(2 / 3),
    }
    assert found["scores"]["popular"] == dict.fromkeys(("accuracy", "precision", "recall", "f1"), 1) | {
        "yes_ratio": 0.5
    }
    assert found["scores"]["adversarial"]["f1"] == pytest.approx(2 / 3)  # tp 1, fp 1
    assert found["scores"]["mean_f1"] == pytest.approx((0.5 + 1 + 2 / 3) / 3)
    assert found["scores"]["mean_accuracy"] == pytest.approx((1 / 3 + 1 + 1 / 2) / 3)
    assert found["n"] == 7 and found["intervals"]["random"]["accuracy"]["n"] == 3


@pytest.mark.parametrize(
    "text, read",
    [
        ("No", False),
        ("no, there is none", False),
        ("It is not. Yes", False),
        ("There is. No doubt", True),
        ("No.", False),
        ("Yes,no", True),  # without its comma: Yesno
        ("NO", True),
        ("None", True),
        ("Nope", True),
        ("\nno", True),  # split at blanks alone
        ("", True),
    ],
)
def test_how_an_answer_is_read(text, read):
    assert yes(text) is read


def test_lmms_evals_reading(folder, tmp_path):
    said = ["Yes", " YES ", "no.", "yes", "No", "maybe", "no"]
    rows = [{"question_id": 10 + i, "text": text} for i, text in enumerate(said)]
    found = score_answers(lines(tmp_path / "l.jsonl", rows), folder, Pope(preset="lmms-eval")).results
    assert found["preset"] == "lmms-eval" and found["prompt"] is None
    # random: yes to kettle (yes) and zebra (no); "no." to tram (yes) is neither word
    assert found["scores"]["random"] == {
        "accuracy": pytest.approx(1 / 3),
        "precision": 0.5,
        "recall": 1,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": pytest.approx(2 / 3),  # of the labels
    }
    # adversarial: maybe to tram (yes), no to truck (no)
    assert found["scores"]["adversarial"] == {
        "accuracy": 0.5,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0.5,
    }


def test_questions_are_put_as_published(folder):
    first = Pope().items(folder, DataConfig())[0]
    prompt = "Is there a kettle in the picture?\nAnswer the question using a single word or phrase."
    assert first.record.id == "10" and first.record.messages[-1].text == prompt
    assert first.record.images[0].path == folder / "val2014" / KITCHEN
    assert Pope().row(first, "Yes") == {"question_id": 10, "prompt": prompt, "text": "Yes"}
    asked = Pope(prompt="{question} Yes or no?").items(folder, DataConfig())[0]
    assert asked.record.messages[-1].text == "Is there a kettle in the picture? Yes or no?"
    assert "must hold {question}" in refusal(Pope, prompt="Well?")


def test_without_llavas_questions_they_are_numbered_as_llavas(tmp_path):
    items = Pope().items(pope(tmp_path, questions=False), DataConfig())
    wanted = [*range(1, 3), *range(10_000_001, 10_000_004), *range(20_000_001, 20_000_003)]
    assert [int(item.record.id) for item in items] == wanted
    assert [item.labels["category"] for item in items] == ["adversarial"] * 2 + ["random"] * 3 + [
        "popular"
    ] * 2


def edited(file, change):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    lines(file, rows)


def test_labels_that_do_not_join(folder):
    read = Pope().items
    file = folder / "coco_pope_random.json"
    edited(file, lambda rows: rows[1].update(text="Is a zebra there?"))
    said = refusal(read, folder, DataConfig())
    assert "questions.jsonl: 1 of 7 questions have no label: 11; take questions and labels" in said
    edited(folder / "questions.jsonl", lambda rows: rows.pop(1))
    said = refusal(read, folder, DataConfig())
    assert f"1 labels are of no question: random {KITCHEN} Is a zebra there?" in said
    edited(file, lambda rows: rows.append(rows[0]))
    assert "coco_pope_random.json: 1 questions come several times" in refusal(read, folder, DataConfig())
    edited(file, lambda rows: rows[0].update(label="maybe"))
    assert "label: is 'maybe'; it must be yes or no" in refusal(read, folder, DataConfig())
    file.unlink()
    said = refusal(read, folder, DataConfig())
    assert "coco_pope_random.json or coco/coco_pope_random.json is missing; put it there" in said


def test_questions_that_come_several_times(folder):
    file = folder / "questions.jsonl"
    edited(file, lambda rows: rows[1].update(question_id=10))
    assert "questions.jsonl: 1 ids come several times: 10" in refusal(Pope().items, folder, DataConfig())
    edited(file, lambda rows: rows.append(rows[0] | {"question_id": 99}))
    edited(file, lambda rows: rows[1].update(question_id=11))
    said = refusal(Pope().items, folder, DataConfig())
    assert f"1 questions come several times: random {KITCHEN} Is there a kettle in the picture?" in said


def test_answers_to_another_copy_of_pope(folder, tmp_path):
    rows = [{"question_id": 10 + i, "text": "no", "prompt": "Is there a moon?"} for i in range(7)]
    file = lines(tmp_path / "others.jsonl", rows)
    assert "7 answers are to other questions of the same ids: " in refusal(
        score_answers, file, folder, "pope"
    )
    rows = [{"question_id": 10 + i, "text": "no", "image": STREET} for i in range(7)]
    assert "3 answers are to other questions" in refusal(
        score_answers, lines(tmp_path / "pictures.jsonl", rows), folder, "pope"
    )


def test_what_a_model_answers_scores_as_its_file_does(folder, tmp_path):
    """Stopped and continued as any other: tests/evaluation/test_evaluation_run.py."""
    short = Pope(sampling=SamplingConfig(temperature=0.0, max_tokens=2))
    found = evaluate(bundle(), folder, short, out=tmp_path / "out", batch_size=4)
    assert found.results["model"] and found.results["prompt"] == short.prompt and found.results["n"] == 7
    assert [line["question_id"] for line in found.lines] == [*range(10, 17)]
    again = score_answers(tmp_path / "out" / "answers.jsonl", folder, short).results
    assert (again["scores"], again["intervals"]) == (found.results["scores"], found.results["intervals"])


def test_pictures_that_are_missing(folder, tmp_path):
    (folder / "val2014" / KITCHEN).unlink()
    said = refusal(evaluate, bundle(), folder, "pope", out=tmp_path / "out")
    assert f"val2014: 1 of 2 images are missing: {KITCHEN}; put them there" in said
    assert not (tmp_path / "out").exists()
