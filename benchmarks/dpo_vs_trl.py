"""DPO pairs per second, this project against TRL, alternating on one machine; JSON on stdout.

    python benchmarks/dpo_vs_trl.py --trl-python VENV/bin/python > benchmarks/results/dpo_vs_trl.json

Run it in this project's environment. VENV is one with the extra `oracle` (torch, TRL, PEFT); the model
and pairs are created there. Each round runs TRL with its defaults, TRL with its fastest setting (gradient
checkpointing off), this project, and this project with reference log-probs (and, where the tower is
frozen, its features) stored beforehand in sequence, so that temporary slowdowns of the machine affect all
of them; the ratio is between medians over rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def run(python: str, script: str, *options: str) -> dict:
    done = subprocess.run([python, str(HERE / script), *options], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {' '.join(options)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="python of the environment with TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--modes", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--family", choices=["llava_next", "llava_onevision"], default="llava_next")
    parser.add_argument("--work", type=Path, help="folder for model and pairs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not (work / "model").exists():
            subprocess.run(
                [args.trl_python, str(HERE / "make_model.py"), "--out", str(work), "--family", args.family],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        results = {mode: compare(args, work, mode) for mode in args.modes}
    print(json.dumps(results, indent=1))


def compare(args: argparse.Namespace, work: Path, mode: str) -> dict:
    common = ["--model", str(work / "model"), "--data", str(work / "pairs" / "pairs.jsonl")]
    common += ["--mode", mode, "--steps", str(args.steps), "--dtype", args.dtype]
    sides = {
        "trl_default": (args.trl_python, "trl_dpo.py", *common, "--gc", "1"),
        "trl_best": (args.trl_python, "trl_dpo.py", *common, "--gc", "0"),
        "mllm_align": (sys.executable, "ours_dpo.py", *common),
        "stored": (sys.executable, "ours_dpo.py", *common, "--stored", "reference"),
    }
    if mode == "lora":  # full fine-tuning trains the tower, too
        sides["stored"] += ("features",)
    rounds: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, command in sides.items():
            rounds[name].append(run(*command))
            print(mode, name, rounds[name][-1]["pairs_per_s"], file=sys.stderr, flush=True)
    median = {name: statistics.median(r["pairs_per_s"] for r in each) for name, each in rounds.items()}
    return {
        "pairs_per_s": {n: [r["pairs_per_s"] for r in each] for n, each in rounds.items()},
        "ratio_to_trl_best": round(median["mllm_align"] / median["trl_best"], 2),
        "ratio_stored_to_trl_best": round(median["stored"] / median["trl_best"], 2),
        "ratio_to_trl_default": round(median["mllm_align"] / median["trl_default"], 2),
        "last_round": {name: each[-1] for name, each in rounds.items()},
    }


if __name__ == "__main__":
    main()
