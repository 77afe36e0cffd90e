"""Files of verdicts: joined by name, refused with a count where they do not join, runs averaged."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from bench_folders import lines, value
from refusals import refusal

from mllm_align.evaluation.benchmarks.llava_wild import LlavaWild
from mllm_align.evaluation.reviews import score_reviews

KINDS = ("conv", "detail", "conv", "complex")


@pytest.fixture
def folder(tmp_path):
    asked = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"What is {i}?", "category": kind}
        for i, kind in enumerate(KINDS)
    ]
    lines(tmp_path / "wild/questions.jsonl", asked)
    return tmp_path / "wild"


def said(*texts, **more):
    return [
        {"question_id": i, "category": f"llava_bench_{KINDS[i]}", "content": text} | more
        for i, text in enumerate(texts)
    ]


ONE = said("8 4\nShort.", "10, 5", "2,4", "5 5")
TWO = said("8 8", "10 5", "4 4", "it depends")


def test_verdicts_join_by_name_in_the_order_of_the_questions(folder, tmp_path):
    found = score_reviews([lines(tmp_path / "r.jsonl", ONE[::-1])], folder, "llava-wild")
    assert found.results["scores"] == {
        "score": pytest.approx(100 * 18 / 25),
        "by_category": {
            "llava_bench_conv": 80,
            "llava_bench_detail": 50,
            "llava_bench_complex": 100,
        },
    }
    assert (found.results["n"], found.results["unparsable"]) == (4, 0)
    assert [line["tuple"] for line in found.lines] == [[8, 4], [10, 5], [2, 4], [5, 5]]
    assert found.lines[0] == {
        "index": 0,
        "run": 1,
        **ONE[0],
        "tuple": [8, 4],
        "figures": {"score": [400, 8], "by_category/llava_bench_conv": [400, 8]},
        "record": {
            "id": "0",
            "group": "0",
            "question": "What is 0?",
            "images": [str(folder / "images/0.jpg")],
        },
    }


def test_several_runs_give_mean_and_deviation(folder, tmp_path):
    files = [lines(tmp_path / "1.jsonl", ONE), value(tmp_path / "2.json", TWO)]
    out = tmp_path / "out"
    found = score_reviews(files, folder, "llava-wild", out=out)
    scores, runs = found.results["scores"], [100 * 18 / 25, 100 * 17 / 22]
    assert scores["runs"] == pytest.approx(runs) and scores["score"] == pytest.approx(np.mean(runs))
    assert scores["std"] == pytest.approx(np.std(runs))
    assert scores["by_category"]["llava_bench_conv"] == pytest.approx(90)  # 80 and 100
    assert scores["by_category"]["llava_bench_complex"] == 100  # the second run has none that can be read
    interval = found.results["intervals"]["score"]
    assert interval["low"] < scores["score"] < interval["high"] and interval["n"] == 4
    assert found.results["unparsable"] == 1
    assert found.lines[-1]["unparsable"] and found.lines[-1]["tuple"] == [-1, -1]
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "reviews.jsonl"]
    assert json.loads((out / "results.json").read_text()) == found.results
    assert score_reviews(files, folder, "llava-wild", out=out) == found
    # what was written is a file of verdicts, too
    again = score_reviews([out / "reviews.jsonl"], folder, "llava-wild")
    assert again.results["scores"] == scores and again.lines == found.lines
    differ = refusal(score_reviews, files[:1], folder, "llava-wild", out=out)
    assert "is of another evaluation" in differ


@pytest.mark.parametrize(
    "rows, problem",
    [
        (ONE[:2], "r.jsonl: 2 of 4 questions have no verdict: 2, 3; add them"),
        (ONE + ONE[1:3], "r.jsonl: 2 ids come several times: 1, 2; keep one of each"),
        ([*ONE, {"question_id": 9, "content": "5 5"}], "1 verdicts are on no question of the data: 9"),
        ([*ONE[:3], ONE[3] | {"category": "conv"}], "1 verdicts are on other questions of the same ids: 3"),
        ([*ONE[:3], ONE[3] | {"question": "Who?"}], "1 verdicts are on other questions of the same ids: 3"),
        ([*ONE[:3], {"question_id": 3}], "verdict 4, content: is missing; give the judge's text"),
        ([*ONE[:3], {"question_id": 3, "content": 7}], "verdict 4, content: is a int; give"),
        ([*ONE[:3], {"content": "5 5"}], "verdict 4: says nothing of its question ('question_id')"),
        ([*ONE[:3], 5], "verdict 4: is '5'; give an object"),
        ([*ONE[:3], ONE[3] | {"run": "two"}], "verdict 4, run: is 'two'; give its number"),
        ([*ONE, *said("1 1", run=2)], "r.jsonl run 2: 3 of 4 questions have no verdict: 1, 2, 3"),
        (said("good", "", "7", "11 5"), "none of 4 verdicts can be read, the first being 'good'"),
        ([], "r.jsonl: has no verdicts; give at least one"),
    ],
)
def test_what_does_not_join(folder, tmp_path, rows, problem):
    file, out = lines(tmp_path / "r.jsonl", rows), tmp_path / "out"
    assert problem in refusal(score_reviews, [file], folder, LlavaWild(), out=out)
    assert not out.exists()


def test_files_that_can_not_be_read(folder, tmp_path):
    file = tmp_path / "r.jsonl"
    assert "r.jsonl: can't be read (No such file" in refusal(score_reviews, [file], folder, LlavaWild())
    file.write_text('{"question_id": 1}\n{"question_id"\n')
    assert "r.jsonl line 2: is not JSON" in refusal(score_reviews, [file], folder, LlavaWild())
    file.write_text('{"question_id": 1, "content": "5 5", "content": "6 6"}\n{}\n')
    problem = "r.jsonl line 1: 1 names come several times: content"
    assert problem in refusal(score_reviews, [file], folder, LlavaWild())
    assert "evaluator Pope takes no verdicts" in refusal(score_reviews, [file], folder, "pope")
    assert "no files of verdicts" in refusal(score_reviews, [], folder, LlavaWild())
    lines(tmp_path / "out/reviews.jsonl", ONE)
    theirs = refusal(score_reviews, [lines(file, ONE)], folder, LlavaWild(), out=tmp_path / "out")
    assert "reviews.jsonl: is there without results.json, so it is not ours" in theirs


def test_the_command(folder, tmp_path):
    """A platform that is not there would end it."""
    files = [lines(tmp_path / "1.jsonl", ONE), lines(tmp_path / "2.jsonl", TWO)]
    command = [sys.executable, "-m", "mllm_align.cli", "evaluate", "llava-wild", "--data", str(folder)]
    command += ["--reviews", *map(str, files), "--out", str(tmp_path / "out")]
    env = os.environ | {"JAX_PLATFORMS": "nosuch"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\nruns                    72.0000, 77.2727\n" in done.stdout
    marked = (
        f"1 verdicts can't be read: left out of the figures; {tmp_path / 'out'}/reviews.jsonl marks them"
    )
    assert f"{marked}\n4 records; {tmp_path / 'out'}" in done.stdout
