"""`mllm-align evaluate`: a user's evaluator by file and name, its options, what is refused."""

import json

import pytest
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
