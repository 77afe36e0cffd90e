"""Small folders of benchmarks in the layouts of their makers, with texts of our own."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

KITCHEN, STREET = "COCO_val2014_000000000007.jpg", "COCO_val2014_000000000012.jpg"
THINGS = {
    "random": ((KITCHEN, "kettle", "yes"), (KITCHEN, "zebra", "no"), (STREET, "tram", "yes")),
    "popular": ((KITCHEN, "kettle", "yes"), (STREET, "person", "no")),
    "adversarial": ((STREET, "tram", "yes"), (STREET, "truck", "no")),
}


def lines(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def value(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(len(file.name)).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(grey).save(file)


def pope(folder: Path, questions: bool = True) -> Path:
    """Seven questions on two pictures; LLaVA's numbers where there is a file of questions."""
    asked = []
    for split, rows in THINGS.items():
        labels = [
            {
                "question_id": i,
                "image": image,
                "text": f"Is there a {thing} in the picture?",
                "label": label,
            }
            for i, (image, thing, label) in enumerate(rows, 1)
        ]
        lines(folder / f"coco_pope_{split}.json", labels)
        asked += [(split, row["image"], row["text"]) for row in labels]
    if questions:
        rows = [
            {"question_id": 10 + i, "image": image, "text": f"{text}\nBe brief.", "category": split}
            for i, (split, image, text) in enumerate(asked)
        ]
        lines(folder / "questions.jsonl", rows)
    for name in (KITCHEN, STREET):
        picture(folder / "val2014" / name)
    return folder
