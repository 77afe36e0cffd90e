"""launch/tpu_pod.sh: its commands, and whole jobs on two hosts that a stand-in for gcloud makes here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from shlex import split

import pytest
from launching import ROOT, commands, environment, launch, program

ZONE = ["--zone", "us-east5-b"]
EVERYWHERE = ["--node=all", "--worker=all", "--batch-size=all"]
TPUS = ["gcloud", "compute", "tpus", "queued-resources"]


def dry(*words: str) -> list[list[str]]:
    done = launch("tpu_pod.sh", *words[:2], *ZONE, "--dry-run", *words[2:])
    assert done.returncode == 0, done.stderr
    return commands(done.stdout)


def test_create_asks_for_one_slice():
    create, describe = dry("create", "pod", "--type", "v5litepod-16", "--spot", "--project", "p")
    assert create == [
        *TPUS,
        "create",
        "pod",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=pod",
        "--spot",
        "--zone=us-east5-b",
        "--project=p",
    ]
    assert describe == [
        *TPUS,
        "describe",
        "pod",
        "--format=value(state.state)",
        "--zone=us-east5-b",
        "--project=p",
    ]


def test_create_asks_for_several_slices():
    create, _ = dry(
        *split("create pod --type v6e-16 --node-count 2 --internal-ip --reserved --service-account a@b")
    )
    assert {
        "--node-count=2",
        "--node-prefix=pod",
        "--internal-ips",
        "--reserved",
        "--service-account=a@b",
    } < {*create}
    assert "--runtime-version=v2-alpha-tpuv6e" in create and "--node-id=pod" not in create


def test_setup_copies_what_is_committed_and_installs_it():
    archive, copy, install = dry("setup", "pod")
    assert archive[:4] == ["git", "-C", str(ROOT), "archive"] and archive[-1] == "HEAD"
    assert copy == [
        *TPUS,
        "scp",
        archive[-2],
        "pod:mllm-align.tar.gz",
        *EVERYWHERE,
        ZONE[0] + "=" + ZONE[1],
    ]
    assert install[:-2] == [*TPUS, "ssh", "pod", *EVERYWHERE]
    assert install[-2].startswith("--command=") and install[-2].endswith("tpu_host.sh setup")


def test_run_keeps_the_programs_words():
    (run,) = dry("run", "pod", "--", "train", "a b", "--mesh.fsdp", "-1")
    assert run[:-2] == [*TPUS, "ssh", "pod", *EVERYWHERE]
    assert run[-2] == "--command=bash mllm-align/launch/tpu_host.sh run train 'a b' --mesh.fsdp -1"


def test_run_with_recreate_shows_what_it_would_do():
    verbs = [
        c[4] if c[0] == "gcloud" else c[0]
        for c in dry("run", "pod", "--recreate", "--type", "v4-32", "--", "train")
    ]
    assert verbs == ["ssh", "delete", "create", "describe", "git", "scp", "ssh"]


def test_the_short_verbs():
    assert dry("stop", "pod")[0][-2] == "--command=bash mllm-align/launch/tpu_host.sh stop"
    assert dry("status", "pod") == [[*TPUS, "describe", "pod", "--zone=us-east5-b"]]
    assert dry("delete", "pod") == [[*TPUS, "delete", "pod", "--force", "--quiet", "--zone=us-east5-b"]]
    assert dry("exec", "pod", "--", "ls", "-l")[0][-2] == "--command=ls -l"
    assert "--internal-ip" in dry("exec", "pod", "--internal-ip", "--", "ls")[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the first word is ''"),
        (["create", "Pod", *ZONE], "NAME is 'Pod'"),
        (["create", "pod", "--type", "v4-8"], "--zone is ''"),
        (["create", "pod", *ZONE], "--type is ''"),
        (["create", "pod", *ZONE, "--type", "v9-8"], "give --runtime-version"),
        (["create", "pod", *ZONE, "--type", "v4-8", "--spot", "--reserved"], "exclude each other"),
        (["create", "pod", *ZONE, "--type", "v4-8", "--", "x"], "takes no words"),
        (["run", "pod", *ZONE], "run needs --"),
        (["run", "pod", *ZONE, "--retries", "many", "--", "train"], "--retries is 'many'"),
        (["run", "pod", *ZONE, "--recreate", "--", "train"], "--type is ''"),
        (["stop", "pod", *ZONE, "--now"], "unknown option '--now'"),
    ],
)
def test_mistakes_are_told_in_one_line(words, says):
    done = launch("tpu_pod.sh", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("tpu_pod.sh: error: ")
        and says in done.stderr
        and done.stderr.count("\n") == 1
    )


# A pod of two hosts: the folders host0 and host1, in which each remote command really runs, at once. Like
# the real one it waits for all. The file `taken` says that the TPUs were taken away, until they are created
# again; `unreached`, that ssh fails once.
GCLOUD = r"""
cd "$POD" || exit
echo "$4" >>verbs
case $4 in
    describe) if [[ -e taken ]]; then echo SUSPENDED; else echo ACTIVE; fi ;;
    create) rm -f taken ;;
    ssh)
        for word in "$@"; do [[ $word != --command=* ]] || command=${word#--command=}; done
        if [[ -e unreached ]]; then rm unreached; exit 255; fi
        pids=()
        for i in 0 1; do
            mkdir -p host$i/mllm-align/launch
            cp "$LAUNCH/tpu_host.sh" host$i/mllm-align/launch
            (cd host$i && HOST=$i bash -c "$command") &
            pids+=($!)
        done
        failed=0
        for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
        exit "$failed" ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """pod(text, *words): runs the bash program `text` as a job; $HOST is the host, $try counts from 1."""
    program(tmp_path, "gcloud", GCLOUD)
    (tmp_path / "here").mkdir()

    def run(text: str, *words: str, work: str = "train"):
        fake = program(
            tmp_path, "program", f"echo x >>$POD/tries$HOST; try=$(wc -l <$POD/tries$HOST)\n{text}"
        )
        return subprocess.run(
            [ROOT / "launch/tpu_pod.sh", "run", "pod", *ZONE, *words, "--", work, "a b"],
            env=environment(
                tmp_path,
                POD=str(tmp_path),
                LAUNCH=f"{ROOT}/launch",
                MLLM_ALIGN_PROGRAM=str(fake),
                TPU_POD_PAUSE="0",
            ),
            cwd=tmp_path / "here",
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def tries(folder: Path) -> int:
    return len((folder / "tries0").read_text().splitlines())


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        ('[[ $1-$2 == "train-a b" ]]', 0, 1),
        ("((try < 5)) && exit 75; exit 0", 0, 5),
        ("((try < 2)) && exit 134; exit 0", 0, 2),
        ("exit 1", 1, 3),
        ("exit $((HOST == 0 ? 1 : 2))", 2, 1),
        ("exit $((HOST == 0 ? 134 : 3))", 3, 1),
        ("((try > 1)) && exit 0; exit $((75 * HOST))", 0, 2),
    ],
)
def test_when_a_job_starts_again(pod, tmp_path, text, status, expected):
    done = pod(text, "--retries", "2")
    assert (done.returncode, tries(tmp_path)) == (status, expected), done.stderr
    assert (tmp_path / "here/pod.log").exists()


def test_a_host_that_is_not_reached_is_a_failure(pod, tmp_path):
    (tmp_path / "unreached").touch()
    done = pod("exit 0")
    assert (done.returncode, tries(tmp_path)) == (0, 1) and "exit status 255; restart 1 of 5" in done.stderr


def test_tpus_that_were_taken_away_end_the_job(pod, tmp_path):
    done = pod("touch $POD/taken; exit 75")
    assert (done.returncode, tries(tmp_path)) == (75, 1)
    assert "run with --recreate" in done.stderr


def test_tpus_that_were_taken_away_are_created_again(pod, tmp_path):
    # setup runs on the stand-in's hosts, too: with a tar that brings the host script, and an idle python3.
    program(tmp_path, "python3", "echo jax 1.2.3")
    program(tmp_path, "tar", "mkdir mllm-align/launch; cp $LAUNCH/tpu_host.sh mllm-align/launch")
    done = pod(
        "[[ $1 == train ]] || exit 0; ((try > 1)) && exit 0; touch $POD/taken; exit 137",
        *split("--recreate --type v4-16 --prepare 'touch mounted'"),
    )
    assert done.returncode == 0, done.stderr
    verbs = (tmp_path / "verbs").read_text().split()
    assert verbs == ["ssh", "describe", "delete", "create", "describe", "scp", "ssh", "ssh", "ssh"]
    assert all((tmp_path / f"host{i}/mounted").exists() for i in range(2))


def test_what_runs_on_a_host_is_ended_before_the_next_start(tmp_path):
    host = tmp_path / "mllm-align/launch/tpu_host.sh"
    host.parent.mkdir(parents=True)
    host.write_text((ROOT / "launch/tpu_host.sh").read_text())
    fake = program(
        tmp_path,
        "program",
        f"[[ $1 == new ]] && exit 0\ntrap 'touch {tmp_path}/saved; exit 75' TERM; echo up; sleep 50 & wait",
    )
    settings = environment(MLLM_ALIGN_PROGRAM=str(fake))
    old = subprocess.Popen(["bash", host, "run", "old"], env=settings, stdout=subprocess.PIPE, text=True)
    assert old.stdout is not None and old.stdout.readline() == "up\n"
    new = subprocess.run(
        ["bash", host, "run", "new"], env=settings, capture_output=True, text=True, timeout=30
    )
    assert new.returncode == 0 and new.stdout.endswith(" ended: 0\n")
    assert (tmp_path / "saved").exists() and old.wait(timeout=10) == 75
