"""Rollouts of online training against transformers' `generate`, in turn on one machine; JSON on stdout.

    python benchmarks/rollout_vs_hf.py --hf-python VENV/bin/python > benchmarks/results/rollout_vs_hf.json

VENV is an environment with the extra `oracle` (torch, transformers). The model is the quickstart's after
SFT, or any tiny one: K responses to each of some prompts, drawn at temperature 1, ended by the model or
after 96 tokens. Here that is the program that online training runs: vision tower, one prefill a prompt and
K forks, then the host's fetch. There it is one `generate` over all prompts, padded on the left, with
`num_return_sequences`. Pixels are ready on both sides. Both sides stay up and take turns, a pass each,
after a pass that compiles; first both decode greedily, and transformers has to find the tokens of this
project.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from generate_vs_hf import check, run
from machine import machine

HERE = Path(__file__).parent
PEERS = {"sdpa": ["--attention", "sdpa"], "eager": ["--attention", "eager"]}


class Side:
    """A side that waits for its turn."""

    def __init__(self, python: str, script: str, *options: object):
        command = [python, str(HERE / script), "rollout", *map(str, options), "--turns"]
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.process.args[1:])} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def spread(turns: list[dict], name: str) -> dict:
    values = [turn[name] for turn in turns]
    return {"min": min(values), "median": round(statistics.median(values), 4), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    quickstart = Path("runs/quickstart/seed-0")
    parser.add_argument("--hf-python", required=True, help="python of the environment with transformers")
    parser.add_argument("--model", type=Path, default=quickstart / "sft")
    parser.add_argument("--data", type=Path, default=quickstart / "data" / "sft.jsonl")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2, help="K")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        common = ["--folder", work, "--model", args.model]
        ours, theirs = [*common, "--data", args.data], [*common, "--images", "ready"]
        run(sys.executable, "ours_generate.py", "rollout", *ours, "--write", args.prompts)
        theirs += ["--batch", args.prompts, "--samples", args.samples, "--threads", args.threads]
        greedy = run(args.hf_python, "hf_generate.py", "rollout", *theirs, "--check")
        check("rollout", greedy["greedy"])
        sizes = ["--records", args.prompts, "--samples", args.samples]
        sides = {"mllm_align": Side(sys.executable, "ours_generate.py", *ours, *sizes)}
        for name, options in PEERS.items():
            sides[f"transformers_{name}"] = Side(args.hf_python, "hf_generate.py", *theirs, *options)
        turns: dict[str, list[dict]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                turns[name].append(side.turn())
            print(
                {name: each[-1]["tokens_per_s"] for name, each in turns.items()},
                file=sys.stderr,
                flush=True,
            )
        for side in sides.values():
            side.close()
    speed = {name: spread(each, "tokens_per_s") for name, each in turns.items()}
    own = speed["mllm_align"]["median"]
    result = {
        "greedy": greedy["greedy"],
        "tokens_per_s": speed,
        "seconds": {name: spread(each, "seconds") for name, each in turns.items()},
        "cpu_s": {name: spread(each, "cpu_s") for name, each in turns.items()},
        "longest": {name: spread(each, "longest") for name, each in turns.items()},
        "ratio": {n: round(own / each["median"], 2) for n, each in speed.items() if n != "mllm_align"},
        "prompts": args.prompts,
        "samples": args.samples,
        "threads": args.threads,
        **machine(),
        "versions": greedy["versions"],
        "turns": turns,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
