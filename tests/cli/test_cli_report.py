"""`mllm-align report`: runs and evaluations by their folders."""

import json
import os
import subprocess
import sys

import pytest
from bench_folders import lines, pope

from mllm_align.evaluation.answers import score_answers


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, loss in (("a", 0.5), ("b", 0.25)):
        events = [{"event": "start", "step": 0, "steps": 3}]
        events += [{"event": "train", "step": n, "loss": loss / n} for n in (1, 2)]
        lines(tmp_path / name / "log.jsonl", events)
        (tmp_path / name / "config.json").write_text(json.dumps({"seed": 0}))
    return "a", "b"


def test_runs_of_a_command_without_jax(runs, tmp_path):
    """A platform that is not there would end the command."""
    command = [sys.executable, "-m", "mllm_align.cli", "report", *runs, "--out", "page.html"]
    env = os.environ | {"JAX_PLATFORMS": "nosuch"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a: step 2 of 3, no end yet; loss 0.500 to 0.250.",
        "b: step 2 of 3, no end yet; loss 0.250 to 0.125.",
        "page.html",
    ]
    assert "a, b" in (tmp_path / "page.html").read_text()


def test_evaluations(run, runs, refused, tmp_path):
    folder = pope(tmp_path / "pope")
    for name, text in (("yes", "Yes"), ("no", "No")):
        rows = [{"question_id": 10 + i, "text": text} for i in range(7)]
        score_answers(
            lines(tmp_path / f"{name}.jsonl", rows), folder, "pope", out=tmp_path / "figures" / name
        )
    status, printed, _ = run("report", "figures/yes", "figures/no", "--out", "page.html")
    assert status == 0 and printed.startswith("pope: no is worse than yes (mean_f1 ")
    assert printed.endswith("\npage.html\n") and "no against yes" in (tmp_path / "page.html").read_text()
    mixed = refused("report", "figures/yes", "a", "--out", "mixed.html")
    assert "figures/yes is an evaluation and a is not; give folders of one kind" in mixed


def test_what_is_refused(runs, refused):
    assert "report needs --runs, --out" in refused("report")
    assert "gone/config.json: can't be read" in refused("report", "a", "gone", "--out", "page.html")
