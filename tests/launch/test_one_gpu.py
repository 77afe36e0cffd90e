"""launch/gpu.sh, with a stand-in for nvidia-smi."""

from __future__ import annotations

from shlex import split

import pytest
from launching import ROOT, commands, launch, program

RUN = ["--", "--model", "a b", "--data", "d", "--out", "r"]


@pytest.fixture
def gpu(tmp_path):
    """gpu(free, *words): the launcher on a machine whose GPU has `free` of 80,000 MiB free."""

    def start(free: int, *words: str, driver: str = "580.65.06", **variables: str):
        program(tmp_path, "nvidia-smi", f'echo "NVIDIA H100 80GB HBM3, {driver}, 80000, {free}"')
        return launch("gpu.sh", *words, *RUN, folder=tmp_path, **variables)

    return start


def test_the_command(gpu):
    done = gpu(79000, "--dry-run", "--gpu", "1", "--profile", "5")
    assert done.returncode == 0, done.stderr
    assert commands(done.stdout) == [
        [
            *split("env CUDA_VISIBLE_DEVICES=1 JAX_PLATFORMS=cuda mllm-align train"),
            *split(f"{ROOT}/configs/debug.py --debug-nans --profile 5"),
            *RUN[1:],
        ]
    ]
    assert "79000 of 80000 MiB free" in done.stderr


def test_no_profile(gpu):
    assert "--profile" not in gpu(79000, "--dry-run", "--profile", "0").stdout


@pytest.mark.parametrize(
    ("free", "setting"), [(62400, None), (62399, "0.74"), (40000, "0.47"), (4000, "0.04")]
)
def test_memory_is_bounded_only_where_others_hold_some(gpu, free, setting):
    (words,) = commands(gpu(free, "--dry-run").stdout)
    settings = [w.split("=")[1] for w in words if w.startswith("XLA_PYTHON_CLIENT_MEM_FRACTION")]
    assert settings == ([setting] if setting else [])


def test_it_runs_the_program(gpu, tmp_path):
    fake = program(tmp_path, "program", 'echo "$JAX_PLATFORMS $#"; exit 3')
    done = gpu(79000, MLLM_ALIGN_PROGRAM=str(fake))
    assert (done.returncode, done.stdout) == (3, "cuda 11\n")


def test_mistakes_are_told_in_one_line(gpu, tmp_path):
    for done, says in [
        (gpu(79000, "--gpu", "first"), "--gpu is 'first'"),
        (gpu(79000, "--cpu"), "unknown option '--cpu'"),
        (gpu(79000, driver="535.1"), "too old for CUDA 13"),
        (gpu(79000, driver="N/A"), "not understood"),
        (launch("gpu.sh"), "give -- --model M --data D --out RUN"),
    ]:
        *found, line = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("gpu.sh: error: ") and says in line
        assert all("MiB free" in each for each in found), "before it stands at most the GPU"
    program(tmp_path, "nvidia-smi", 'echo "No devices were found"; exit 6')
    done = launch("gpu.sh", *RUN, folder=tmp_path)
    assert done.returncode == 2 and "shows no GPU 0: No devices were found" in done.stderr
