"""What a step of online training costs: seconds of rollout, annotation and update apart; JSON on stdout.

    python benchmarks/online_steps.py > benchmarks/results/online_steps.json

Trains some steps with each of the Scenes configs, as `mllm-align train` does, and takes medians over the
lines of log.jsonl, without the steps that compile: those before `--skip`, and any whose figure is more
than three times as large or as small as the median.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine, other_cpu_seconds

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RUNS = {  # config: (data, whether an annotator ranks)
    "online_dpo_scenes": ("sft.jsonl", True),
    "mixed_dpo_scenes": ("pairs.jsonl", True),
    "online_bdhs_scenes": ("sft.jsonl", False),
    "povid_scenes": ("sft.jsonl", False),
}
NAMES = (
    "rollout/seconds",
    "annotate/seconds",
    "update/seconds",
    "seconds_per_step",
    "rollout/tokens_per_second",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    quickstart = Path("runs/quickstart")
    parser.add_argument("--model", type=Path, default=quickstart / "seed-0" / "sft")
    parser.add_argument("--data", type=Path, default=quickstart / "seed-0" / "data", help="a folder")
    parser.add_argument("--scenes", type=Path, default=quickstart / "scenes", help="what the oracle reads")
    parser.add_argument("--configs", nargs="+", choices=RUNS, default=[*RUNS])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, default=5, help="first steps that are left out")
    args = parser.parse_args()
    results: dict = {name: measured(args, name) for name in args.configs}
    print(json.dumps({"steps": args.steps, "skip": args.skip, **machine(), "runs": results}, indent=1))


def measured(args: argparse.Namespace, name: str) -> dict:
    data, annotated = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = ["--model", args.model, "--data", args.data / data, "--out", out]
        options += ["--steps", args.steps, "--log-every", 1]
        options += ["--online.annotator.scenes", args.scenes] if annotated else []
        command = [sys.executable, "-m", "mllm_align.cli", "train", CONFIGS / f"{name}.py", *options]
        other, own = other_cpu_seconds(), sum(os.times()[2:4])
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "update/seconds" in line]
    used = sum(os.times()[2:4]) - own
    result = {name: spread([line[name] for line in steps if name in line][args.skip :]) for name in NAMES}
    result |= {"cpu_s": round(used, 1), "other_cpu_s": round(other_cpu_seconds() - other - used, 1)}
    print(name, result, file=sys.stderr, flush=True)
    return result


def spread(values: list[float]) -> dict | None:
    if not values:
        return None
    middle = statistics.median(values)
    kept = [value for value in values if middle / 3 <= value <= middle * 3]  # the others compiled
    each = {"min": min(kept), "median": statistics.median(kept), "max": max(kept)}
    return {**{k: round(v, 4) for k, v in each.items()}, "steps": len(kept)}


if __name__ == "__main__":
    main()
