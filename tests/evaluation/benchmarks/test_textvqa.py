"""The VQA accuracy against counts by hand and a second implementation; TextVQA's files."""

import itertools

import pytest
from bench_folders import lines, value
from refusals import refusal

from mllm_align import DataConfig
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.benchmarks.textvqa import TextVqa, normalised, vqa_accuracy


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("The Cat", "cat"),
        ("a an the", ""),
        ("Two, three?", "2 3"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("$5.00", "$5.00"),
        ("st. johns.", "st johns"),
        (".5", ".5"),
        ("e-mail", "e mail"),
        ("e- mail", "e mail"),
        ("Coca-Cola - zero", "cocacola 0"),  # a mark that touches a blank once is deleted everywhere
        ("(left)", "left"),
        ("dont", "don't"),
        ("yalld've y'alldve", "yalld've y'alldve"),  # they lack two
        ("y'all'dve", "y'all'd've"),
        ("Bob's", "bob 's"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("a\nb\tc", "b c"),
        (f"{'x. ' * 33}", f"{'x ' * 32}x."),  # 32 full stops at most
    ],
)
def test_how_an_answer_is_normalised(text, wanted):
    assert normalised(text) == wanted


@pytest.mark.parametrize("matches, wanted", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_an_answer_counts_by_how_many_gave_it(matches, wanted):
    answers = ["Yes!"] * matches + ["no"] * (10 - matches)
    assert vqa_accuracy("yes", answers) == pytest.approx(wanted)


def test_the_accuracy_against_its_definition():
    """The mean over the ten subsets of nine of min(1, matches / 3)."""
    for answers in itertools.product("ab", repeat=10):
        nines = itertools.combinations(answers, 9)
        wanted = sum(min(1, nine.count("b") / 3) for nine in nines) / 10 if "b" in answers else 0
        assert vqa_accuracy("b", answers) == pytest.approx(wanted)


@pytest.fixture
def folder(tmp_path):
    def row(image, question, answer):
        return {"image_id": image, "question": question, "answers": [answer] * 10, "question_id": 1}

    folder = tmp_path / "textvqa"
    rows = [
        row("p1", "What brand?", "Acme"),
        row("p1", "Which year?", "1990"),
        row("p2", "What brand?", "Zeta"),
    ]
    value(folder / "TextVQA_0.5.1_val.json", {"data": rows})
    asked = [
        ("p1", "What brand?\nReference OCR token: ACME, 12\nBe brief."),
        ("p1", "Which year?\nReference OCR token: \nBe brief."),
        ("p2", "Reference OCR token: Z\nWhat brand?\nBe brief."),
    ]
    rows = [{"question_id": image, "image": f"{image}.jpg", "text": text} for image, text in asked]
    lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    return folder


def test_prompts_with_and_without_the_words_read(folder):
    short = "Answer the question using a single word or phrase."
    with_words = [item.record.messages[-1].text for item in TextVqa().items(folder, DataConfig())]
    assert with_words[0] == f"What brand?\nReference OCR token: ACME, 12\n{short}"
    assert with_words[1] == f"Which year?\nReference OCR token: \n{short}"
    (folder / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    without = TextVqa(ocr=False).items(folder, DataConfig())
    assert without[0].record.messages[-1].text == f"What brand?\n{short}"
    assert without[0].record.images[0].path == folder / "train_images" / "p1.jpg"
    said = refusal(TextVqa().items, folder, DataConfig())
    assert "llava_textvqa_val_v051_ocr.jsonl is missing; put it there" in said


def test_lmms_evals_questions(folder):
    items = TextVqa(preset="lmms-eval").items(folder, DataConfig())
    file = folder / "TextVQA_0.5.1_val.json"
    file.write_text(file.read_text().replace("What brand?", "what Brand is IT?"))
    item = TextVqa(preset="lmms-eval").items(folder, DataConfig())[0]
    said = "What brand is it?\nAnswer the question using a single word or phrase."
    assert item.record.messages[-1].text == said and item.record.id == "p1 what brand is it?"
    assert items[1].record.messages[-1].text.startswith("Which year?\nAnswer")


def test_answers_join_by_picture_and_question(folder, tmp_path):
    rows = [
        {"question_id": "p2", "prompt": "What brand?\nx", "text": "zeta."},
        {"question_id": "p1", "prompt": "Which Year?\nReference OCR token: \nx", "text": "1991"},
        {"question_id": "p1", "prompt": "Reference OCR token: A\nWhat brand?\nx", "text": "The ACME"},
    ]
    found = score_answers(lines(tmp_path / "a.jsonl", rows), folder, "textvqa")
    assert found.results["scores"] == {"accuracy": pytest.approx(200 / 3)}
    assert [line["accuracy"] for line in found.lines] == [1, 0, 1]
    twice = lines(tmp_path / "b.jsonl", [*rows, rows[0]])
    assert "1 ids come several times: p2 what brand?" in refusal(score_answers, twice, folder, "textvqa")
    bare = lines(tmp_path / "c.jsonl", [{"question_id": "p1", "text": "x"}])
    assert "answer 1: says nothing of its question" in refusal(score_answers, bare, folder, "textvqa")


def test_a_line_of_answers_is_llavas(folder):
    evaluator = TextVqa()
    item = evaluator.items(folder, DataConfig())[0]
    row = evaluator.row(item, "Acme")
    assert (row["question_id"], row["text"]) == ("p1", "Acme") and evaluator.key(row) == item.record.id


def test_questions_that_llavas_file_lacks(folder):
    file = folder / "llava_textvqa_val_v051_ocr.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    assert "1 of 3 questions are not in it: p2 what brand?" in refusal(
        TextVqa().items, folder, DataConfig()
    )
