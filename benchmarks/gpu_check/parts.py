"""The parts in order, each in a separate process with a share of the time.

A separate process gives each part all of the device's memory and its own XLA flags, can be stopped if it
hangs, and affects no other part if it crashes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check.lines import LAST

LEAST = 10.0  # seconds: no process starts JAX in less
DEVICES = "devices"  # the item without which no other part is begun


@dataclass(frozen=True)
class Part:
    """share: of the whole time. flags: further options of XLA."""

    name: str
    share: float
    flags: str = ""


PARTS = (
    Part("device", 0.02),
    Part("parity", 0.22),  # most of it compiles for the CPU, too
    Part("attention", 0.15, "--xla_gpu_autotune_level=0"),  # numbers, not times
    # XLA then tunes no kernel by its time and takes none that adds in any order
    Part("resume", 0.20, "--xla_gpu_deterministic_ops=true"),
    Part("train", 0.23),
    Part("generation", 0.13),
    Part("profile", 0.05),
)


@dataclass
class Budget:
    """Seconds for everything. A part has its share and what the ones before it left."""

    seconds: float
    parts: Sequence[Part] = PARTS
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def of(self, part: Part) -> float:
        """Seconds that a part may take if it begins now; 0 where it no longer fits."""
        later = self.parts[self.parts.index(part) + 1 :]
        own = part.share * self.seconds
        spare = self.left() - own - sum(each.share for each in later) * self.seconds
        seconds = min(own + max(spare, 0.0), self.left())
        return seconds if seconds >= min(LEAST, own) else 0.0


Line = dict[str, Any]
Command = Callable[[Part, float], list[str]]


def run_all(command: Command, budget: Budget, say: Callable[[Line], None], work: Path) -> list[Line]:
    """Every part in turn; all lines that were said."""
    lines: list[Line] = []

    def keep(line: Line) -> None:
        lines.append(line)
        say(line)

    for part in budget.parts:
        seconds = budget.of(part)
        reason = "" if seconds else f"{max(budget.left(), 0):.0f} s are left of {budget.seconds:.0f} s"
        if any(x["item"] == DEVICES and x["status"] == "failed" for x in lines):
            reason = "there is no device to run it on"
        if reason:
            keep({"part": part.name, "item": "part", "status": "left out", "reason": reason})
            continue
        run_part(part, command(part, seconds), seconds, keep, work)
    return lines


def run_part(
    part: Part, command: list[str], seconds: float, say: Callable[[Line], None], work: Path
) -> None:
    """Hands on the part's lines as they come; adds one if its process ends badly or is out of time."""
    began, errors = time.monotonic(), work / f"{part.name}.stderr"
    with open(errors, "wb") as err:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=err, env=environment(part, work), start_new_session=True
        )
        reader = threading.Thread(target=_hand_on, args=(process.stdout, say), daemon=True)
        reader.start()
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    reader.join(10)
    if status:
        ended = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
    else:
        ended = f"stopped: its {seconds:.0f} s were over" if status is None else ""
    if ended:
        tail = errors.read_text(errors="replace").splitlines()[-LAST:]
        failed = {"part": part.name, "item": "part", "status": "failed", "reason": f"its process {ended}"}
        say(failed | {"traceback": [x[:300] for x in tail], "seconds": round(time.monotonic() - began, 2)})


def environment(part: Part, work: Path) -> dict[str, str]:
    here = Path(__file__).resolve().parents[1]
    paths = [str(here.parent), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),  # empty: the first to compile says how long
    }
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {part.flags}".strip()
    platforms = [name for name in env.get("JAX_PLATFORMS", "").split(",") if name]
    if platforms and "cpu" not in platforms:  # the CPU is what parity compares with
        env["JAX_PLATFORMS"] = ",".join([*platforms, "cpu"])
    return env


def _hand_on(stream: Any, say: Callable[[Line], None]) -> None:
    for raw in stream:
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and {"part", "item", "status"} <= line.keys():
            say(line)


def _end(process: subprocess.Popen) -> None:
    """The process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(lines: Sequence[Line], lacking: Sequence[str], seconds: float) -> Line:
    """What passed, failed and was left out, and the packages that were lacking: the last line."""

    def of(status: str) -> list[str]:
        return [f"{x['part']}: {x['item']}" for x in lines if x["status"] == status]

    failed, left_out = of("failed"), of("left out")
    return {
        "part": "summary",
        "item": "all",
        "status": "failed" if failed else "ok",
        "passed": len(of("ok")),
        "failed": failed,
        "left_out": left_out,
        "lacking": list(lacking),
        "seconds": round(seconds, 1),
    }
