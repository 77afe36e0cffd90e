"""What staleness hides of an endpoint's waiting: seconds per step with and without; JSON on stdout.

    python benchmarks/overlap.py > benchmarks/results/overlap.json

Trains with configs/online_dpo_scenes.py and an endpoint on this machine that answers each question after
`--wait` seconds, so many at once as are asked: nothing of the waiting is work. Exact and stale runs take
turns. Figures are medians over the lines of log.jsonl, without the steps that compile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine
from online_steps import spread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from chat_server import chat_server, said, shown

NAMES = ("seconds_per_step", "rollout/seconds", "annotate/seconds", "update/seconds", "staleness")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    quickstart = Path("runs/quickstart/seed-0")
    parser.add_argument("--model", type=Path, default=quickstart / "sft")
    parser.add_argument("--data", type=Path, default=quickstart / "data" / "sft.jsonl")
    parser.add_argument("--wait", type=float, nargs="+", default=[0.2, 0.5, 1.0], help="seconds an answer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, default=5, help="first steps that are left out")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    runs = [
        {"wait": wait, "stale": stale, **measured(args, wait, stale)}
        for wait in args.wait
        for _ in range(args.rounds)
        for stale in (False, True)
    ]
    print(json.dumps({"steps": args.steps, "skip": args.skip, **machine(), "runs": runs}, indent=1))


def measured(args: argparse.Namespace, wait: float, stale: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder, chat_server() as chat:
        chat.reply = lambda request, number: said(longer(request), wait=wait)
        options = ["--model", args.model, "--data", args.data, "--out", Path(folder) / "run"]
        options += ["--steps", args.steps, "--log-every", 1]
        options += ["--online.annotator", "endpoint", "--online.annotator.url", chat.url]
        options += ["--online.annotator.concurrency", 64, *(["--online.stale"] if stale else [])]
        command = [sys.executable, "-m", "mllm_align.cli", "train", ROOT / "configs/online_dpo_scenes.py"]
        done = subprocess.run([*map(str, [*command, *options])], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the run failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "run/log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "staleness" in line][args.skip :]
    result = {name: spread([line[name] for line in steps if name in line]) for name in NAMES[:-1]}
    result["staleness"] = [min(s["staleness"] for s in steps), max(s["staleness"] for s in steps)]
    print(f"wait {wait}, stale {stale}:", result, file=sys.stderr, flush=True)
    return result


def longer(request: dict) -> str:
    """A judge that wants much said."""
    first, second = shown(request)
    return "Response 1" if len(first) >= len(second) else "Response 2"


if __name__ == "__main__":
    main()
