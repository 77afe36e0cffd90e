"""The page of a first hour: its commands, in order, on a folder like a small quickstart's."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kept_programs import KEPT
from xla_flags import FAST

PYTHON = os.environ.get("MLLM_ALIGN_ORACLE_PYTHON", sys.executable)
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
QUICKSTART = """
from dataclasses import replace
from pathlib import Path
from shutil import copytree

from miniature import MINIATURE
from mllm_align.testbed.quickstart import phases

phases.LESSONS = ()
recipe, out = replace(MINIATURE, seeing=()), Path("runs/quickstart")
out.mkdir(parents=True)
pictures, clock = phases.Pictures(out / "scenes", recipe.scenes), phases.Clock(out / "seconds.json")
phases.Base(out / "base", 0, recipe, pictures, clock)._learn()
copytree(out / "base" / "start", out / "seed-0" / "sft")
phases.Seed(out / "seed-0", 0, recipe, pictures, clock)._pairs()
"""  # what the page works on: pairs by BDHS, and the model that made them, here of random weights
SHORTER = ("--steps 40", "--steps 12")
PATHS = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = {**os.environ, "XLA_FLAGS": FAST, "PYTHONPATH": PATHS}  # one device, as a person has
NOT_RUN = ("python3 -m venv", "mllm-align quickstart")  # the test's environment; QUICKSTART


def recorded() -> list[tuple[str, list[str]]]:
    """Every command of the page with the lines that it is shown to print."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def masked(line: str) -> str:
    """A line without its figures."""
    return re.sub(r"\d[\d,.:e+-]*", "0", line)


def run(command: str, folder: Path, interrupted: bool) -> tuple[int, list[str]]:
    """Exit status and lines of an mllm-align command; Ctrl-C comes after its second step."""
    words = [sys.executable, "-m", "mllm_align.cli", *shlex.split(command.replace(*SHORTER))[1:]]
    pipes: dict = {"env": ENV | KEPT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, cwd=folder, text=True, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if interrupted and re.match(r"step +[2-9]", line):
                process.send_signal(signal.SIGINT)
                interrupted = False
        return process.wait(), lines


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """A folder in which all commands of the page have run: [(command, shown, status, printed)]."""
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("hour")
    subprocess.run([sys.executable, "-c", QUICKSTART], cwd=folder, env=ENV | KEPT, check=True)
    done = []
    for command, shown in recorded():
        if command == "echo $?":
            assert shown == [str(done[-1][2])]
        elif not command.startswith(NOT_RUN):
            done.append((command, shown, *run(command, folder, "^C" in shown)))
    return folder, done


@pytest.mark.slow
def test_every_command_does_what_is_shown(hour):
    folder, done = hour
    assert len(done) >= 9
    for command, shown, status, printed in done:
        assert status == (130 if "^C" in shown else 0), (command, printed)
        assert masked(shown[0]) in map(masked, printed), command  # a slow machine says more before it
        if shown[-1] != "..." and " generate " not in command:  # what a model says differs
            assert masked(shown[-1]) == masked(printed[-1]), command
    first, again, last = (each for each in done if " train " in each[0])
    assert first[0] == again[0] == last[0]
    assert "interrupted; step" in first[3][-1] and "resuming runs/first" in "\n".join(again[3])
    assert "runs/first is finished" in "\n".join(last[3])
    assert (folder / "runs" / "aligned" / "config.json").exists()


@pytest.mark.oracle
def test_the_aligned_folder_loads_in_transformers(hour):
    """By the interpreter with torch, named in MLLM_ALIGN_ORACLE_PYTHON (default: this one)."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    done = subprocess.run([PYTHON, "-c", code], cwd=hour[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LlavaNextForConditionalGeneration ")
