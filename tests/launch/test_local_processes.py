"""launch/local.sh runs real small processes: their environment, output, signals and exit statuses."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT, commands, environment, launch, program


@pytest.fixture
def run(tmp_path):
    """run(text, *words): two processes of a bash program that knows its number as $JAX_PROCESS_ID."""

    def start(text, *words, count=2):
        fake = program(tmp_path, "program", f"i=$JAX_PROCESS_ID\n{text}")
        return launch("local.sh", count, *words, "--", "train", "a b", MLLM_ALIGN_PROGRAM=str(fake))

    return start


def test_each_process_is_told_who_it_is(run):
    done = run(
        'echo "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $JAX_PLATFORMS $XLA_FLAGS <$*> $#"',
        "--devices",
        4,
        count=3,
    )
    assert done.returncode == 0, done.stderr
    flag = "--xla_force_host_platform_device_count=4"
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {i}/3 cpu {flag} <train a b> 2" for i in range(3)]


def test_all_get_one_address_with_a_free_port(run):
    addresses = run('echo "$JAX_COORDINATOR_ADDRESS"').stdout
    ports = re.findall(r"\[\d\] 127\.0\.0\.1:(\d+)\n", addresses)
    assert len(ports) == 2 and len(set(ports)) == 1 and 20000 <= int(ports[0]) < 32000


def test_output_and_errors_stay_apart(run):
    done = run("echo out; echo err >&2")
    assert sorted(done.stdout.splitlines()) == ["[0] out", "[1] out"]
    assert sorted(done.stderr.splitlines()) == ["[0] err", "[1] err"]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("exit 0", 0),
        ("exit 75", 75),
        ("exit $((75 * i))", 75),
        ("sleep 0.$i; exit $((i == 0 ? 134 : 1))", 134),
        ("sleep 0.$((2 - 2 * i)); exit $((i == 0 ? 134 : 1))", 1),
        ("sleep 0.$i; exit $((i == 0 ? 75 : 1))", 1),
        ("sleep 0.$i; exit $((i == 0 ? 1 : 2))", 2),
        ("sleep 0.$i; exit $((i == 0 ? 137 : 3))", 3),
        ("((i)) || kill -KILL $$", 137),
    ],
)
def test_the_exit_status_of_the_job(run, text, status):
    assert run(text).returncode == status


def test_a_process_that_waits_for_a_dead_one_is_killed_in_the_end(run):
    began = time.time()
    done = run("((i)) && exit 9; echo waits; trap '' TERM; sleep 50 & wait", "--grace", 1)
    assert done.returncode == 9 and "[0] waits" in done.stdout
    assert 1 <= time.time() - began < 8
    assert "still running 1 s after another failed are killed" in done.stderr


def test_others_may_end_by_themselves_after_a_failure(run):
    done = run("((i)) && exit 134; sleep 0.5; echo noticed; exit 1", "--grace", 30)
    assert done.returncode == 134 and "[0] noticed" in done.stdout


def test_what_a_dead_process_leaves_behind_is_ended(run, tmp_path):
    done = run(f"sleep 50 & echo $! >{tmp_path}/left-$i; exit 1")
    assert done.returncode == 1
    for i in range(2):
        # It has ended, or at least (until the system's first process looks after it) is a zombie.
        stat = Path("/proc", (tmp_path / f"left-{i}").read_text().strip(), "stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_go_to_every_process(tmp_path, sent, status):
    fake = program(
        tmp_path,
        "program",
        "trap 'echo saved; exit 75' TERM; trap 'echo stopped; exit 130' INT; echo ready; sleep 50 & wait",
    )
    job = subprocess.Popen(
        [ROOT / "launch/local.sh", "2", "--", "train"],
        env=environment(MLLM_ALIGN_PROGRAM=str(fake)),
        stdout=subprocess.PIPE,
        text=True,
        # tests that run in the background may ignore it, and what a shell finds ignored it can't trap
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert job.stdout is not None
    assert sorted([job.stdout.readline(), job.stdout.readline()]) == ["[0] ready\n", "[1] ready\n"]
    job.send_signal(sent)
    rest, _ = job.communicate(timeout=20)
    word = "saved" if status == 75 else "stopped"
    assert sorted(rest.splitlines()) == [f"[0] {word}", f"[1] {word}"]
    assert job.returncode == status


def test_dry_run_prints_what_would_run():
    done = launch("local.sh", 2, "--devices", 2, "--dry-run", "--", "train", "a b", XLA_FLAGS="--xla_x=1")
    first, second = commands(done.stdout)
    assert done.returncode == 0
    assert first[0] == "env" and first[-3:] == ["mllm-align", "train", "a b"]
    assert "XLA_FLAGS=--xla_x=1 --xla_force_host_platform_device_count=2" in first
    assert [w.replace("ID=0", "ID=1") for w in first] == second


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "how many processes"),
        (["two", "--", "train"], "the number of processes is 'two'"),
        ([0, "--", "train"], "whole number from 1"),
        ([2, "--devices", "08", "--", "train"], "--devices is '08'"),
        ([2], "what shall be run"),
        ([2, "train"], "unknown option 'train'"),
        ([2, "--grace"], "--grace needs a value"),
        ([2, "--", "train"], "no program 'nowhere'"),
    ],
)
def test_mistakes_are_told_in_one_line(words, says):
    done = launch("local.sh", *words, MLLM_ALIGN_PROGRAM="nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("local.sh: error: ") and says in done.stderr and done.stderr.count("\n") == 1
    )
