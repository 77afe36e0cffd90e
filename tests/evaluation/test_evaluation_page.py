"""The page of an evaluation: every figure, difference and chosen example is on it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from bench_folders import lines, value
from PIL import Image, ImageDraw
from refusals import refusal

from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.page import page_of_folders, write_page

SYNONYMS = "person, woman, man\nchair, seat\nelephant\ncup, mug\ndining table, table\n"
THINGS = ("person", "chair", "elephant", "cup", "dining table")


def chair_folder(folder: Path, count: int = 30) -> Path:
    """Pictures of two things each; every third also has a cup."""
    objects, ground = {}, Image.effect_noise((640, 426), 40).convert("RGB")
    for id in range(count):
        objects[str(id)] = [THINGS[id % 3], "dining table", *["cup"] * (id % 3 == 0)]
        image = ground.copy()
        ImageDraw.Draw(image).ellipse((40 + 9 * id, 60, 300 + 9 * id, 320), fill=(200, 60 + 5 * id, 20))
        file = folder / f"val2014/COCO_val2014_{id:012d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    (folder / "synonyms.txt").write_text(SYNONYMS)
    value(folder / "objects.json", objects)
    return folder


def captions(count: int, every: int) -> list[dict]:
    """One in `every` names a cup that is not there, or is."""
    said = "The picture shows {} beside a table. {}Light falls in from the left side of the room."
    return [
        {
            "image_id": id,
            "caption": said.format(
                f"a {THINGS[id % 3]}", "Two Mugs and a cup stand on it. " if id % every == 0 else ""
            ),
        }
        for id in range(count)
    ]


def gqa_folder(folder: Path, pictures: Path, count: int = 90) -> Path:
    asked = {
        str(id): {
            "imageId": f"COCO_val2014_{id % 30:012d}",
            "question": f"Is the thing on the left number {id}?",
            "answer": "yes" if id % 2 else "no",
        }
        for id in range(count)
    }
    value(folder / "testdev_balanced_questions.json", asked)
    (folder / "images").symlink_to(pictures / "val2014")
    return folder


def sample(tmp_path: Path) -> dict:
    """Three models on CHAIR, of which the third was not asked GQA's questions."""
    chair = chair_folder(tmp_path / "chair")
    gqa = gqa_folder(tmp_path / "gqa", chair)
    rng = np.random.default_rng(0)
    found: dict = {}
    for model, every, share in (
        ("base", 2, 0.5),
        ("dpo-run", 7, 0.8),
        ("a_model_with_a_long_name", 1, None),
    ):
        file = lines(tmp_path / f"{model}.jsonl", captions(30, every))
        found[model] = {"chair": score_answers(file, chair, "chair", out=tmp_path / model / "chair")}
        if share is not None:
            rows = [
                {"question_id": str(id), "text": ("no", "yes")[(id + (rng.random() > share)) % 2]}
                for id in range(90)
            ]
            file = lines(tmp_path / f"{model}-gqa.jsonl", rows)
            found[model]["gqa"] = score_answers(file, gqa, "gqa", out=tmp_path / model / "gqa")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return sample(tmp_path_factory.mktemp("sample"))


class Reader(HTMLParser):
    """Texts by the tag that they stand in."""

    def __init__(self, text: str):
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.pictures: list[dict] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in ("img", "meta", "link", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(" ".join(data.split()))


def drawn(found, tmp_path):
    sentences = write_page(found, tmp_path / "report.html")
    return Reader((tmp_path / "report.html").read_text()), sentences


def test_several_models_have_their_figures_and_differences(found, tmp_path):
    page, sentences = drawn(found, tmp_path)
    assert page.texts["h1"] == ["dpo-run, a_model_with_a_long_name against base"]
    base, dpo = (found[name]["chair"].results["scores"] for name in ("base", "dpo-run"))
    assert f"{base['chair_s']:.1f}" in page.texts["b"] and f"{dpo['chair_s']:.1f}" in page.texts["b"]
    assert [each.partition(":")[0] for each in sentences] == ["chair", "chair", "gqa"]
    assert "dpo-run is better than base (chair_s" in sentences[0]
    assert "a_model_with_a_long_name is worse than base (chair_s" in sentences[1]
    assert all(sentence in page.texts["li"] for sentence in sentences)
    said = [text for text in page.texts["li"] if "against base:" in text]
    assert said[0].startswith("dpo-run against base: better on chair") or "better on" in said[0]
    assert {"better", "worse"} <= set(page.texts["small"])
    assert [text for text in page.texts["th"] if text.startswith(("chair:", "gqa:"))] == [
        "chair: chair_s",
        "chair: chair_i",
        "chair: recall",
        "gqa: accuracy",
    ]


def test_the_most_changed_answers_are_shown_with_what_they_made_up(found, tmp_path):
    page, _ = drawn(found, tmp_path)
    counts = [text for text in page.texts["p"] if "scored as base’s" in text]
    lines = zip(found["base"]["chair"].lines, found["dpo-run"]["chair"].lines, strict=True)
    figures = [[{n: s / w for n, (s, w) in line["figures"].items()} for line in pair] for pair in lines]
    gains = [
        b["recall"] - a["recall"] - (b["chair_i"] - a["chair_i"]) - (b["chair_s"] - a["chair_s"])
        for a, b in figures
    ]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    assert better > 5 and worse and f"dpo-run: {better} better, {worse} worse, " in "".join(counts)
    assert {"Marked words", "Mugs", "cup"} == set(page.texts["mark"])
    assert len(page.pictures) == 12 and all(p["src"].startswith("data:image/jpeg") for p in page.pictures)
    names = page.texts["figcaption"]
    assert len(names) == 12 and len(set(names[:6])) == 6


def test_one_model_shows_its_worst_answers(found, tmp_path):
    page, sentences = drawn({"base": {"gqa": found["base"]["gqa"]}}, tmp_path)
    assert sentences == [] and page.texts["h1"] == ["base on gqa"]
    assert "Answers that scored worst" in page.texts["h2"]
    wrong = {line["record"]["question"] for line in found["base"]["gqa"].lines if not line["right"]}
    asked = [text for text in page.texts["p"] if text.startswith("Is the thing")]
    assert len(asked) == 6 and set(asked) <= wrong


def test_pages_of_folders_are_named_after_them(found, tmp_path):
    place = Path(found["base"]["chair"].results["answers"]).parent
    folders = [place / model / name for model in ("base", "dpo-run") for name in ("chair", "gqa")]
    sentences = page_of_folders(folders, tmp_path / "page.html")
    assert "dpo-run is better than base" in sentences[0] and len(sentences) == 2
    assert "is given twice" in refusal(page_of_folders, [folders[0], folders[0]], tmp_path / "p.html")
    assert "can't be read" in refusal(page_of_folders, [place], tmp_path / "p.html")


def test_texts_are_escaped_and_missing_pictures_left_out(found, tmp_path):
    evaluation = found["base"]["gqa"]
    hostile = [json.loads(json.dumps(line)) for line in evaluation.lines]
    for line in hostile:
        line["text"] = "<script>alert(1)</script>"
        line["record"] |= {"question": "<img src=http://x>", "images": ["/gone.jpg"]}
    page, _ = drawn({"<b>": {"gqa": evaluation._replace(lines=hostile)}}, tmp_path)
    assert page.pictures == [] and "script" not in page.texts
    assert "<script>alert(1)</script>" in page.texts["dd"]
    assert not re.search(
        r"https?://(?!www\.w3\.org)", re.sub(r"&lt;.*?&gt;", "", Path(tmp_path / "report.html").read_text())
    )


def test_what_cant_be_compared_is_told_and_the_rest_is_drawn(found, tmp_path):
    base, other = found["base"]["gqa"], found["dpo-run"]["gqa"]
    moved = [line | {"record": line["record"] | {"question": "another"}} for line in other.lines]
    page, sentences = drawn({"A": {"gqa": base}, "B": {"gqa": other._replace(lines=moved)}}, tmp_path)
    assert sentences[0].startswith("gqa: B: 90 records are other questions than those of A")
    assert sentences[0] in page.texts["li"] and len(page.texts["b"]) == 2
