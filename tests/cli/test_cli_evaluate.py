"""`mllm-align evaluate`: a user's evaluator by file and name, its options, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from bench_folders import lines, pope, value
from runs import MODEL, PAIRS

from mllm_align.data.readers import records_from

FILE = """
from dataclasses import dataclass
from mllm_align import Evaluator, SamplingConfig, Scored

@dataclass(frozen=True)
class Mine(Evaluator):
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=6)
    fails: str = ""

    def score(self, item, answer):
        if item.record.id == self.fails:
            raise KeyError(item.record.id)
        return Scored({"letters": len(answer)}, {"first": answer[:1]})
"""
ALL = ("--model", MODEL, "--data", PAIRS, "--out", "r")


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_eval.py").write_text(FILE)


def test_a_users_own_by_file_and_name(run, refused, tmp_path):
    four = ("--evaluator.sampling.max-tokens", "4")
    status, printed, _ = run("evaluate", "--evaluator", "my_eval.py:Mine", *ALL, *four)
    begins, _, figures = printed.partition("\n")
    assert status == 0 and begins == "starting r/answers.jsonl"
    assert figures.startswith("letters") and figures.endswith("0 left out; r\n")
    result = json.loads((tmp_path / "r/results.json").read_text())
    assert result["benchmark"] == f"{tmp_path / 'my_eval.py'}:Mine"
    assert result["config"]["sampling"]["max_tokens"] == 4
    assert list(result["part_files"]) == [str(tmp_path / "my_eval.py")]
    again = f"r is finished: nothing to do\n{figures}"
    assert run("evaluate", "my_eval.py:Mine", *ALL, *four)[:2] == (0, again)
    (tmp_path / "my_eval.py").write_text(FILE + "# another\n")
    line = refused("evaluate", "my_eval.py:Mine", *ALL, *four)
    assert "r: is of another evaluation" in line


def test_an_error_of_a_users_own_keeps_what_was_generated(run, tmp_path):
    name = records_from(PAIRS)[0].id
    status, _, line = run("evaluate", "my_eval.py:Mine", *ALL, "--evaluator.fails", name)
    assert status == 2 and f"my_eval.py:Mine raises KeyError: '{name}'; mend it" in line
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["answers.jsonl.part"]


def test_the_config_is_printed_without_a_model(run, tmp_path):
    status, printed, _ = run("evaluate", "my_eval.py:Mine", "--print-config", "--batch-size", "3")
    config = json.loads(printed)
    assert status == 0 and config["batch_size"] == 3
    assert config["evaluator"]["kind"] == f"{tmp_path / 'my_eval.py'}:Mine"


def test_help_names_the_evaluators(run):
    status, printed, _ = run("evaluate", "--help")
    assert status == 0 and printed.startswith("usage: mllm-align evaluate EVALUATOR --data")
    assert "--evaluator.sampling.max-tokens" in printed


@pytest.mark.parametrize(
    "words, problem",
    [
        ((), "evaluate needs an evaluator first: mllm-align evaluate EVALUATOR"),
        (
            ("pop", *ALL),
            "'pop' is no evaluator; give one of ",
        ),
        (("gone.py:Mine", *ALL), "gone.py"),
        (("my_eval.py:Theirs", *ALL), "Theirs"),
        (("scenes", *ALL), "is not named after a scene"),
        (("my_eval.py:Mine", *ALL[:4]), "evaluate needs --out"),
        (("my_eval.py:Mine", *ALL, "--evaluator.fail", "x"), "did you mean --evaluator.fails?"),
        (
            ("my_eval.py:Mine", *ALL[:5], "my_eval.py"),
            "my_eval.py: this is a file; name a folder",
        ),
        (
            ("pope", "--model", "gone", "--data", "away", "--out", "r"),
            "data is 'away'; give the benchmark's",
        ),
        (("my_eval.py:Mine", *ALL[2:]), "evaluate needs --model, which answers, or --answers"),
        (
            ("my_eval.py:Mine", *ALL, "--answers", "a.jsonl"),
            "takes --model or --answers, not both",
        ),
        (
            ("mmhal", *ALL, "--judge.name", "x"),
            "judge.name is given, but no judge; name it with judge.url or judge.model",
        ),
        (
            ("mmhal", "--reviews", "r.jsonl", *ALL[2:], "--judge.model", "m"),
            "evaluate takes --reviews or --judge, not both",
        ),
        (
            ("mmhal", "--answers", "a.jsonl", *ALL[2:]),
            "name one with --judge.url or --judge.model, or give --reviews",
        ),
    ],
)
def test_what_is_refused(refused, words, problem):
    assert problem in refused("evaluate", *words)


def test_several_models_have_folders_and_a_page(run, tmp_path):
    """The models are the same, so nothing can be told."""
    shutil.copytree(MODEL, tmp_path / "copy" / MODEL.name)
    models = ("--model", MODEL, tmp_path / "copy" / MODEL.name)
    words = ("evaluate", "my_eval.py:Mine", *models, "--data", PAIRS, "--out", "r", "--data.max-records", 2)
    status, printed, _ = run(*words)
    names = [f"{Path(MODEL).resolve().parent.name}-{MODEL.name}", f"copy-{MODEL.name}"]
    assert status == 0 and printed.startswith(f"starting r/{names[0]}/Mine/answers.jsonl\n")
    assert f"\n{names[1]} on Mine\nletters " in printed
    assert f"Mine: whether {names[1]} is better than {names[0]} can't be told (letters " in printed
    assert printed.endswith("\nr/report.html\n")
    found = [json.loads((tmp_path / f"r/{name}/Mine/results.json").read_text()) for name in names]
    assert found[0]["scores"] == found[1]["scores"] and found[0]["model"] != found[1]["model"]
    assert "letters" in (tmp_path / "r/report.html").read_text()


def test_all_that_is_there_with_a_failure_at_the_end(run, tmp_path):
    pope(tmp_path / "root/pope")
    value(
        tmp_path / "root/gqa/testdev_balanced_questions.json",
        {"1": {"question": "What?", "imageId": "n1", "answer": "x"}},
    )
    words = ("evaluate", "all", "--model", MODEL, "--data", "root", "--out", "r", "--batch-size", 7)
    status, printed, line = run(*words)
    assert status == 2 and printed.rstrip().endswith("r/report.html")
    assert f"{MODEL.name} on pope\nrandom accuracy" in printed
    *before, last = line.strip().splitlines()
    said = "gqa: root/gqa/images: 1 of 1 images are missing: n1.jpg"
    assert any(each.startswith(said) for each in before)  # a slow machine shows a progress bar, too
    assert last.startswith("mllm-align: error: 1 of 2 evaluations failed: gqa: ")
    assert (tmp_path / f"r/{MODEL.name}/pope/answers.jsonl").exists()


def test_what_all_does_not_take(refused):
    assert "all takes --model" in refused("evaluate", "all", "--answers", "a", "--data", "d", "--out", "r")
    assert "unknown option --evaluator.prompt" in refused(
        "evaluate", "all", *ALL, "--evaluator.prompt", "x"
    )


def test_one_model_has_a_page_too(run, tmp_path):
    lines(tmp_path / "a.jsonl", [{"id": records_from(PAIRS)[0].id, "response": "x"}])
    words = ("evaluate", "my_eval.py:Mine", "--answers", "a.jsonl", "--data", PAIRS, "--out", "r")
    assert run(*words, "--data.max-records", 1)[0] == 0
    assert "a.jsonl on Mine" in (tmp_path / "r/report.html").read_text()


def test_results_of_an_earlier_version_have_no_page(run, tmp_path):
    """Their lines do not say what their records are."""
    lines(tmp_path / "a.jsonl", [{"id": records_from(PAIRS)[0].id, "response": "x"}])
    words = ("evaluate", "my_eval.py:Mine", "--answers", "a.jsonl", "--data", PAIRS, "--out", "r")
    assert run(*words, "--data.max-records", 1)[0] == 0
    old = json.loads((tmp_path / "r/answers.jsonl").read_text())
    del old["record"]
    lines(tmp_path / "r/answers.jsonl", [old])
    status, printed, line = run(*words, "--data.max-records", 1)
    assert status == 2 and printed.startswith("letters")
    assert "r/answers.jsonl: does not say what its records are; evaluate again, into another folder" in line
