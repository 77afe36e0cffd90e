"""The program: verbs, version, exit statuses."""

import subprocess
import sys

import pytest
from runs import MODEL, PAIRS

from mllm_align.cli.inspect import Inspect
from mllm_align.errors import Interrupted, NotFinite, Preempted


def test_version(run):
    status, out, _ = run("--version")
    assert status == 0 and out.count(".") == 2


@pytest.mark.parametrize(
    "argv, said",
    [
        (["scor"], "no verb 'scor'; did you mean score?"),
        (["frobnicate"], "no verb 'frobnicate'; mllm-align --help"),
        (["train"], "train needs a config first"),
        (["train", "--model", "x"], "train needs a config first"),
        (["score"], "score needs --model, --data, --out"),
        (["score", "--model", "x", "--out", "y"], "score needs --data;"),
        (["export", "--run", "x"], "export needs --out"),
        (["score", "--model", "x", "--data", "y", "--out", "z", "--batchsize", "3"], "--batch-size"),
        (["score", "--model", "x", "--data", "y", "--out", "z", "--dtype", "float16"], "float16"),
        (["export", "--run", "x", "--out", "y", "--adaptor"], "did you mean --adapter?"),
        (["--print-completion"], "--print-completion needs the name of a shell: bash, zsh, fish"),
        (["--print-completion", "csh"], "--print-completion needs the name of a shell"),
        (["configs", "--verbose"], "unknown option --verbose"),
        (["quickstart", "--seeds", "0"], "--seeds is 0"),
        (["quickstart", "--mask-rate", "1.5"], "--mask-rate is 1.5"),
    ],
)
def test_commands_that_are_refused(refused, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*argv)
    assert not list(tmp_path.iterdir())


def test_required_options_of_train(refused, config_file):
    assert "train needs --data, --out;" in refused("train", config_file, "--model", "x")


def test_interrupts_are_told_apart(run, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Inspect, "__call__", interrupt)
    assert run("inspect", "--model", "x", "--data", "y") == (130, "", "mllm-align: interrupted\n")


def program(*argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mllm_align.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True)


def test_as_a_program(tmp_path):
    done = program("score", "--model", tmp_path, "--data", PAIRS, "--out", tmp_path / "s")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("mllm-align: error: ") and done.stderr.count("\n") == 1
    assert program("--help").returncode == 0


@pytest.mark.parametrize(
    "error, status, said",
    [
        (NotFinite("step 3: loss or gradient is not finite"), 3, "mllm-align: error: step 3: loss"),
        (Preempted("preempted; step 3 of 9 is saved"), 75, "the same command goes on from there"),
        (Interrupted("interrupted; step 3 of 9 is saved"), 130, "the same command goes on from there"),
        (KeyboardInterrupt(), 130, "mllm-align: interrupted"),
        (KeyboardInterrupt("interrupted; out is not written"), 130, "mllm-align: interrupted; out is"),
    ],
)
def test_exit_statuses_of_runs_that_end_early(run, config_file, tmp_path, monkeypatch, error, status, said):
    def ends(*_, **__):
        raise error

    monkeypatch.setattr("mllm_align.training.loop.train", ends)
    options = ("--model", MODEL, "--data", PAIRS, "--out", tmp_path / "run")
    found, _, err = run("train", config_file, *options)
    assert found == status and said in err and len(err.splitlines()) == 1
