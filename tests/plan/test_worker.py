"""The process that compiles: what it reports, what it writes, and when it ends."""

import os
import pickle
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from mllm_align import Config
from mllm_align.config import MeshConfig
from mllm_align.plan import hlo, targets, worker
from mllm_align.plan.counts import count
from mllm_align.plan.worker import METADATA, RESULT, TEXT, Job, work
from mllm_align.registry import load_part


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose program is one product; the model is not looked at."""
    monkeypatch.setattr(targets, "check", lambda *_: ["norm"])
    monkeypatch.setattr(targets, "lower", lambda *_: jax.jit(lambda a: a @ a).lower(jnp.zeros((16, 16))))
    config = Config(batch_size=32, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    return Job("train", config, None, None, None, tmp_path)


def test_a_job_of_this_machine(job):
    found = work(job)
    assert found["memory"]["arguments"] == found["memory"]["outputs"] == 4 * 256
    assert pickle.loads((job.folder / METADATA).read_bytes()) == {
        "device": "cpu",
        "devices": 8,
        "rows": 32,
        "mesh": {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2},
        "kept_whole": ["norm"],
        "resident": 0,
        "usable": None,
    }
    assert count(hlo.parse((job.folder / TEXT).read_text())).flops == 2 * 16**3


def test_a_process_without_the_users_file_finds_its_objective(tmp_path):
    (tmp_path / "my_losses.py").write_text(
        "from dataclasses import dataclass\nfrom mllm_align import DPO\n"
        "@dataclass(frozen=True)\nclass Mine(DPO):\n    gamma: float = 1.0\n"
    )
    mine = load_part(f"{tmp_path}/my_losses.py:Mine", "objective")
    job = Job("train", Config(objective=mine(gamma=2.0)), None, None, None, tmp_path)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    found = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).config.objective)"
    command = [sys.executable, "-c", found, str(tmp_path / "job.pickle")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = "beta=0.1, label_smoothing=0.0, sft_weight=0.0, length_normalised=False, gamma=2.0"
    assert out.strip() == f"Mine({settings})"


def test_a_refusal_of_the_compiler_is_a_result(job, monkeypatch):
    class Refused:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")

    monkeypatch.setattr(targets, "lower", lambda *_: Refused())
    assert work(job) == {"error": "RESOURCE_EXHAUSTED: too large"}
    assert (job.folder / METADATA).exists() and not (job.folder / TEXT).exists()


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main() runs the program on a job, as far as its end, and returns (status, result)."""
    monkeypatch.setattr(worker, "_end_with_parent", lambda: None)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(Job("train", None, None, None, None, tmp_path)))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "job.pickle")])

    def ended(status):
        raise SystemExit(status)

    monkeypatch.setattr(worker.os, "_exit", ended)

    def run():
        with pytest.raises(SystemExit) as stop:
            worker.main()
        assert [p.name for p in tmp_path.glob("*.partial")] == []
        return stop.value.code, pickle.loads((tmp_path / RESULT).read_bytes())

    return run


def test_the_result_is_written(main, monkeypatch):
    monkeypatch.setattr(worker, "work", lambda job: {"memory": job.program})
    assert main() == (0, {"memory": "train"})


def test_an_error_is_written_as_a_result(main, monkeypatch):
    def failing(job):
        raise ValueError("of the mesh")

    monkeypatch.setattr(worker, "work", failing)
    status, result = main()
    assert (
        status == 0 and isinstance(result["raised"], ValueError) and str(result["raised"]) == "of the mesh"
    )


def test_a_worker_ends_when_who_waits_is_gone(tmp_path):
    child = f"""
import os, time
from mllm_align.plan.worker import _end_with_parent
_end_with_parent()
open({str(tmp_path / "pid")!r} + ".partial", "w").write(str(os.getpid()))
os.rename({str(tmp_path / "pid")!r} + ".partial", {str(tmp_path / "pid")!r})
time.sleep(600)
"""
    parent = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        wait(lambda: (tmp_path / "pid").exists())
    finally:
        process.kill()
        process.wait()
    pid = int((tmp_path / "pid").read_text())
    wait(lambda: not running(pid))


def wait(until, seconds=60):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid):
    """A process that has ended may stay as a zombie until it is waited for."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
