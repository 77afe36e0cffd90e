"""RLOO against TRL's RLOOTrainer, alternating on one machine; JSON on stdout.

    python benchmarks/rl_vs_trl.py --trl-python VENV/bin/python > benchmarks/results/rl_vs_trl.json

Run it in this project's environment. VENV is one with the extra `oracle`; the model and prompts are those
of dpo_vs_trl.py. An update is everything: four responses to each of four prompts, rewards, log-probs of
policy and reference, the step. The ratio is between medians over rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dpo_vs_trl import HERE, run

FIGURES = ("updates_per_s", "tokens_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="python of the environment with TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--shape", choices=["tiny", "lifelike"], default="tiny")
    parser.add_argument("--work", type=Path, help="folder for model and pairs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not (work / "model").exists():
            make = [args.trl_python, str(HERE / "make_model.py"), "--out", str(work), "--shape", args.shape]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        data = work / "pairs" / "pairs.jsonl"
        common = ["--model", str(work / "model"), "--data", str(data), "--steps", str(args.steps)]
        sides = {"trl": (args.trl_python, "trl_rl.py"), "mllm_align": (sys.executable, "ours_rl.py")}
        rounds: dict[str, list[dict]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, (python, script) in sides.items():
                rounds[name].append(run(python, script, *common))
                print(name, {f: rounds[name][-1][f] for f in FIGURES}, file=sys.stderr, flush=True)
    each = {f: {name: [r[f] for r in made] for name, made in rounds.items()} for f in FIGURES}
    middle = {f: {name: statistics.median(v) for name, v in of.items()} for f, of in each.items()}
    ratio = {f: round(of["mllm_align"] / of["trl"], 2) for f, of in middle.items()}
    last = {name: made[-1] for name, made in rounds.items()}
    print(json.dumps({**each, "ratio": ratio, "last_round": last}, indent=1))


if __name__ == "__main__":
    main()
