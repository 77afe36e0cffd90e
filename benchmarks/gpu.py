"""Verifies and measures the GPU path with one command on a bare machine; JSON lines on stdout.

    python benchmarks/gpu.py            # 8 minutes at most on one GPU; a large one for LLaVA-1.6-7B's shape
    python benchmarks/gpu.py --tiny     # all of it in small, on any device

The first line lists missing packages and the command to download them. Then follow the parts: device,
parity with the CPU, attention kernels, resuming, train steps, generation, profile. Each item prints its own
line when it is finished: part, item, status (ok, failed, left out), metrics, and under `checks` each
checked number with its bound. A part without its packages or enough time is left out; a failed part is
reported, and the next one runs. The exit status is 1 if anything failed. README.md beside this file
explains the output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

FAST = "--xla_backend_optimization_level=0"  # in small, compiling takes nearly all of the time
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the package may not be installed here

from gpu_check import needs
from gpu_check.lines import Lines
from gpu_check.parts import PARTS, Budget, Part, run_all, summary


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--tiny", action="store_true", help="the demo's sizes, on a CPU too")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes is {options.minutes}; it must be above 0")
    return options


def run_here(options: argparse.Namespace) -> None:
    """One part, its lines on what was stdout: what libraries print must not come between them."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lines = Lines(options.part, options.seconds, out)

    def part() -> dict[str, Any]:
        importlib.import_module(f"gpu_check.{options.part}").run(lines, options.work, options.tiny)
        return {}

    lines("part", part)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.part:
        run_here(options)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    packages = needs.report()
    say(packages)
    # the device is looked at whatever is asked for: without one the rest would take hours
    parts = [part for part in PARTS if part.name in ("device", *options.only)]
    if options.tiny:
        parts = [replace(part, flags=f"{part.flags} {FAST}") for part in parts]
    budget = Budget(60 * options.minutes, parts)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:

        def command(part: Part, seconds: float) -> list[str]:
            words = [sys.executable, str(HERE / "gpu.py"), "--part", part.name, "--work", work]
            words += ["--seconds", f"{seconds - 3:.1f}"]  # what it ends by itself, it can tell of
            return [*words, *(["--tiny"] if options.tiny else [])]

        lines = run_all(command, budget, say, Path(work))
    last = summary(lines, [each["name"] for each in packages["lacking"]], time.monotonic() - began)
    say(last)
    return int(last["status"] == "failed")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
