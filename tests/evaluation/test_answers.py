"""Files of answers: joined by name, refused with a count where they do not join, scored without JAX."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from bench_folders import lines, pope, value
from judges import record
from refusals import refusal

from mllm_align import Evaluator, Item, Scored
from mllm_align.evaluation.answers import join, score_answers


@dataclass(frozen=True)
class Letters(Evaluator):
    def score(self, item, answer):
        return Scored({"letters": len(answer)}, {"first": answer[:1]})


@dataclass(frozen=True)
class Some(Letters):
    partial = True


@dataclass(frozen=True)
class Logps(Letters):
    needs = "logps"
    references = 1


ITEMS = [Item(record(name, images=0), {"question": f"What is {name}?"}) for name in "abc"]
ROWS = [{"id": name, "response": f" {name * 2} "} for name in "cab"]


def test_answers_join_by_name_in_the_order_of_the_records(tmp_path):
    found = score_answers(lines(tmp_path / "a.jsonl", ROWS), ITEMS, Letters())
    assert found.results["scores"] == {"letters": 4} and found.results["n"] == 3
    assert [line["id"] for line in found.lines] == ["a", "b", "c"]
    assert found.lines[0] == {
        "index": 0,
        "id": "a",
        "response": " aa ",
        "first": " ",
        "figures": {"letters": [4, 1]},
        "record": {"id": "a", "group": "a", "question": "What is a?", "images": []},
    }
    listed = score_answers(value(tmp_path / "a.json", ROWS), ITEMS, Letters())
    assert listed.lines == found.lines and listed.results["model"] is None is listed.results["prompt"]


@pytest.mark.parametrize(
    "rows, problem",
    [
        (ROWS[:1], "a.jsonl: 2 of 3 questions have no answer: a, b; answer them, too"),
        (ROWS + ROWS[:2], "a.jsonl: 2 ids come several times: c, a"),
        ([*ROWS, {"id": "z", "response": ""}], "1 answers are to no question of the data: z"),
        (
            [*ROWS[:2], ROWS[2] | {"prompt": "Who is b?"}],
            "1 answers are to other questions of the same ids: b",
        ),
        ([*ROWS[:2], {"id": "b"}], "answer 3, response: is missing; give the text"),
        ([*ROWS[:2], {"id": "b", "response": 1}], "answer 3, response: is a int; give the text"),
        ([*ROWS[:2], {"response": "x"}], "answer 3: says nothing of its question (id)"),
        ([*ROWS[:2], 5], "answer 3: is '5'; give an object"),
        ([], "has no answers; give at least one"),
    ],
)
def test_what_does_not_join(tmp_path, rows, problem):
    assert problem in refusal(score_answers, lines(tmp_path / "a.jsonl", rows), ITEMS, Letters())


def test_a_partial_benchmark_takes_what_is_there():
    assert [row["id"] for _, row in join(Some(), ITEMS, ROWS[:2], "file")] == ["a", "c"]
    asked = ROWS[2] | {"prompt": "Look:  WHAT is b?\nBe brief."}
    assert join(Some(), ITEMS, [asked], "file") == [(ITEMS[1], asked)]


def test_files_that_can_not_be_read(tmp_path):
    file = tmp_path / "a.jsonl"
    assert "a.jsonl: can't be read (No such file" in refusal(score_answers, file, ITEMS, Letters())
    file.write_text('{"id": 1}\n{"id"\n')
    assert "a.jsonl line 2: is not JSON" in refusal(score_answers, file, ITEMS, Letters())
    said = refusal(score_answers, lines(file, ROWS), ITEMS, Logps())
    assert said.endswith("evaluator Logps needs log-probs; give --model, not --answers")


def test_a_folder_of_results_is_made_once(tmp_path):
    folder, out = pope(tmp_path / "pope"), tmp_path / "out"
    rows = [{"question_id": 10 + i, "text": "no"} for i in range(7)]
    file = lines(tmp_path / "a.jsonl", rows)
    first = score_answers(file, folder, "pope", out=out)
    assert sorted(path.name for path in out.iterdir()) == ["answers.jsonl", "results.json"]
    assert json.loads((out / "results.json").read_text()) == first.results
    assert score_answers(file, folder, "pope", out=out) == first
    lines(file, [row | {"text": "yes"} for row in rows])
    said = refusal(score_answers, file, folder, "pope", out=out)
    assert "is of another evaluation: its evaluator, settings, data, model or answers differ" in said


def test_jax_does_not_start(tmp_path):
    """A platform that is not there would end the command."""
    folder = pope(tmp_path / "pope")
    file = lines(tmp_path / "a.jsonl", [{"question_id": 10 + i, "text": "no"} for i in range(7)])
    command = [sys.executable, "-m", "mllm_align.cli", "evaluate", "pope", "--data", str(folder)]
    command += ["--answers", str(file), "--out", str(tmp_path / "out")]
    env = os.environ | {"JAX_PLATFORMS": "nosuch"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "mean_f1" in done.stdout and f"7 records; {tmp_path / 'out'}" in done.stdout
