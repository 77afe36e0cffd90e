"""launch/slurm.sh: the batch script, and what it does when it runs, with stand-ins for Slurm's programs."""

from __future__ import annotations

import re
import subprocess
from shlex import split

import pytest
from launching import environment, launch, program

WORDS = split("--nodes 2 --gpus-per-node 4 --time 4:00:00 --retries 2")
RUN = ["--", "train", "a b", "--out", "runs/x"]


def batch(*words: str) -> str:
    done = launch("slurm.sh", *words, "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    script, last = done.stdout.rstrip().rsplit("\n", 1)
    assert last == "# submitted with: sbatch"
    return script


def test_what_is_asked_of_slurm():
    asked = re.findall(
        r"^#SBATCH (\S+)$", batch(*WORDS, *split("--partition gpu --account me --grace 200")), re.M
    )
    assert asked == [
        "--job-name=mllm-align",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gres=gpu:4",
        "--cpus-per-task=8",
        "--time=4:00:00",
        "--partition=gpu",
        "--account=me",
        "--requeue",
        "--open-mode=append",
        "--output=./%x-%j.log",
        "--signal=TERM@200",
    ]


def test_tasks_are_started_with_the_programs_words():
    line = next(line.strip() for line in batch(*WORDS).splitlines() if line.strip().startswith("srun"))
    words = split(line.partition("||")[0])
    assert words[:4] == ["srun", "--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=8"]
    assert words[4:] == ["mllm-align", *RUN[1:]]


@pytest.mark.parametrize(
    ("statuses", "last", "requeued"),
    [
        ([0], 0, False),
        ([2], 2, False),
        ([3], 3, False),
        ([75], 75, True),
        ([134, 0], 0, False),
        ([1, 75], 75, True),
        ([1, 137, 1], 1, False),
    ],
)
def test_what_exit_statuses_do(tmp_path, statuses, last, requeued):
    cases = " ".join(f"{i + 1}) exit {status};;" for i, status in enumerate(statuses))
    program(
        tmp_path,
        "srun",
        f"echo x >>{tmp_path}/runs; case $(wc -l <{tmp_path}/runs) in {cases} *) exit 99;; esac",
    )
    program(tmp_path, "scontrol", f'echo "$@" >{tmp_path}/requeued')
    done = subprocess.run(
        ["bash"], input=batch(*WORDS), env=environment(tmp_path, SLURM_JOB_ID="7"), text=True, timeout=30
    )
    assert done.returncode == last
    assert (tmp_path / "runs").read_text() == "x\n" * len(statuses)
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_it_submits_the_script_with_the_program_found_now(tmp_path):
    program(tmp_path, "sbatch", f"cat >{tmp_path}/script")
    program(tmp_path, "mllm-align", "true")
    done = launch("slurm.sh", *WORDS, *RUN, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/mllm-align train 'a b'" in (tmp_path / "script").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--nodes is ''"),
        ([*WORDS[:2], *RUN], "--gpus-per-node is ''"),
        ([*WORDS, "--time", "soon", *RUN], "--time is 'soon'"),
        ([*WORDS, "--time", "90", *RUN], "must look like 4:00:00"),
        ([*WORDS, "--time", "0:09:00", *RUN], "too little beside --grace 300"),
        ([*WORDS, "--partition", "a b", *RUN], "--partition is 'a b'"),
        ([*WORDS, "--logs", "a b", *RUN], "--logs is 'a b'"),
        ([*WORDS, "--hours", *RUN], "unknown option '--hours'"),
        (WORDS, "what shall be run"),
    ],
)
def test_mistakes_are_told_in_one_line(words, says):
    done = launch("slurm.sh", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("slurm.sh: error: ") and says in done.stderr and done.stderr.count("\n") == 1
    )
