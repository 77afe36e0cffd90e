"""Evaluations as users start them: killed and continued, one process or two, the same answers."""

import json
import time
from pathlib import Path

import pytest
from bench_folders import lines, picture
from jobs import Processes

from mllm_align.testbed.demo import make_model

pytestmark = pytest.mark.slow
THINGS = ("lamp", "ship", "rug", "goat", "comb")
IMAGES = [f"COCO_val2014_{i:012d}.jpg" for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """POPE's layout, with pictures of our own: 150 questions, 15 about each picture; and a model."""
    folder = tmp_path_factory.mktemp("pope")
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"image": image, "text": f"Is there a {thing} {split}?", "label": ("yes", "no")[(i + j) % 2]}
            for i, image in enumerate(IMAGES)
            for j, thing in enumerate(THINGS)
        ]
        lines(folder / "data" / f"coco_pope_{split}.json", rows)
    for image in IMAGES:
        picture(folder / "data" / "val2014" / image)
    make_model(folder / "model")
    return folder


def evaluation(folder: Path, out: Path, count: int = 1) -> Processes:
    words = ["-m", "mllm_align.cli", "evaluate", "pope", "--data", folder / "data"]
    words += ["--model", folder / "model", "--out", out, "--batch-size", "2"]
    return Processes(out, count, [*words, "--evaluator.sampling.max-tokens", "6"])


def found(out: Path) -> tuple[dict, dict]:
    """Scores, and the answers by their questions."""
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text())["scores"], {
        r["question_id"]: r["text"] for r in rows
    }


def test_pope_straight_killed_and_continued_and_on_two_processes(folder, tmp_path):
    assert evaluation(folder, tmp_path / "straight").wait() == [0]
    scores, answers = found(tmp_path / "straight")
    assert len(answers) == 150 and len(set(answers.values())) > 1
    assert set(scores) == {"random", "popular", "adversarial", "mean_accuracy", "mean_f1"}

    out = tmp_path / "killed"
    part = out / "answers.jsonl.part"
    job = evaluation(folder, out)
    end = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") > 20):
        assert time.monotonic() < end, job.said()
        time.sleep(0.01)
    job.kill(0)
    assert job.wait() == [-9] and not (out / "results.json").exists()
    kept = part.read_bytes().count(b"\n") - 1
    assert 0 < kept < 150
    again = evaluation(folder, out)
    assert again.wait() == [0] and "resuming" in again.said()
    assert found(out) == (scores, answers)

    several = evaluation(folder, tmp_path / "several", 2)
    assert several.wait() == [0, 0], several.said()
    assert found(tmp_path / "several") == (scores, answers)
