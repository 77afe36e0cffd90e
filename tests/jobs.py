"""Training jobs as users start them: one or several processes of the command line, on the demo's model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from kept_programs import KEPT
from xla_flags import FAST

from mllm_align.testbed.demo import make_model, make_pairs
from mllm_align.training.checkpoint import Checkpoints, choose

CONFIG = """
from mllm_align import Config, DataConfig, LoraConfig, OptimConfig
from mllm_align.config import DistributedConfig

def get_config():
    return Config(
        lora=LoraConfig(rank=4, alpha=8.0),
        optim=OptimConfig(learning_rate=2e-3, schedule="constant"),
        data=DataConfig(shapes=1, threads=1),
        distributed=DistributedConfig(heartbeat_seconds=10, shutdown_seconds=10),
        batch_size=8,
        steps=24,
        remat="none",
        log_every=1,
        save_every=2,
    )
"""


def demo(folder: Path) -> Path:
    """A model, data and a config for Job."""
    make_model(folder / "model")
    make_pairs(folder / "data", 20, held_out=1)
    (folder / "config.py").write_text(CONFIG)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Processes:
    """`count` processes of one command, `devices` fake CPU devices each; logs beside `place`.

    limit: bytes that a file may have.
    """

    def __init__(
        self, place: Path, count: int, command: list[Any], devices: int = 1, limit: int | None = None
    ):
        port = free_port()
        self.logs = [place.with_name(f"{place.name}.{i}.log") for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            env = {**os.environ, **KEPT, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
            env["XLA_FLAGS"] = f"{FAST} --xla_force_host_platform_device_count={devices}"
            if count > 1:
                env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
                env |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
            with open(log, "w") as file:
                words = [sys.executable, *map(str, command)]
                if limit is not None:
                    words = ["prlimit", f"--fsize={limit}", *words]
                self.processes.append(subprocess.Popen(words, stdout=file, stderr=file, env=env))

    def kill(self, index: int, number: int = signal.SIGKILL) -> None:
        self.processes[index].send_signal(number)

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit statuses; whoever is still there after `seconds` is killed, and a failure."""
        end, statuses = time.monotonic() + seconds, []
        for process in self.processes:
            try:
                statuses.append(process.wait(max(end - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                for each in self.processes:
                    each.kill()
                raise AssertionError(f"still running after {seconds} s:\n{self.said()}") from None
        return statuses

    def done(self) -> None:
        statuses = self.wait()
        assert not any(statuses), f"{statuses}\n{self.said()}"

    def said(self, index: int | None = None) -> str:
        logs = self.logs if index is None else [self.logs[index]]
        return "\n".join(log.read_text(errors="replace") for log in logs)


class Job(Processes):
    """`mllm-align train` on the model, the data and the config of a folder. sets: of the data."""

    def __init__(
        self,
        folder: Path,
        out: Path,
        count: int,
        *options: Any,
        sets: Sequence[str] = ("pairs.jsonl",),
        **how: Any,
    ):
        data = [folder / "data" / each for each in sets]
        files = ["--model", folder / "model", "--data", *data, "--out", out]
        command = ["-m", "mllm_align.cli", "train", folder / "config.py", *files, *options]
        super().__init__(out, count, command, **how)


def reach(out: Path, step: int, event: str = "train", seconds: float = 120, job: Job | None = None) -> None:
    """Wait until the log tells of a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(e["event"] == event and e["step"] >= step for e in log(out)):
            return
        if job is not None and any(p.poll() for p in job.processes):
            break
        time.sleep(0.02)
    raise AssertionError(f"{event} {step} was not reached\n{job.said() if job else ''}")


def log(out: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's log."""
    file = out / "log.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def losses(out: Path) -> dict[int, float]:
    """The last loss that was logged for each step."""
    return {e["step"]: e["loss"] for e in log(out) if e["event"] == "train"}


def final(out: Path | str) -> tuple[int, str, dict[str, np.ndarray]]:
    """(step, digest of the records so far, parameters) of the newest whole checkpoint of a run folder, or
    of a bucket's folder of checkpoints."""
    import jax

    place = epath.Path(out) if isinstance(out, str) else epath.Path(out.resolve()) / "checkpoints"
    step = choose(place)[0]
    assert step is not None, f"no whole checkpoint in {place}"
    checkpoints = Checkpoints(place)
    about, trained = checkpoints.about(step), checkpoints.restore_trained(step)
    checkpoints.close()
    leaves = jax.tree_util.tree_flatten_with_path(trained)[0]
    return step, about["records"], {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def as_it_was(whole: Path, out: Path, step: int) -> None:
    """A copy of a run that ended: as if it had been killed once this step was saved."""
    shutil.copytree(whole, out)
    for place in (out / "checkpoints").iterdir():
        if int(place.name) > step:
            shutil.rmtree(place)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    assert final(out)[0] == max(losses(out)) == step
