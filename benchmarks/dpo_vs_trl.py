"""DPO pairs per second, this project against TRL, alternating on one machine; JSON on stdout.

    python benchmarks/dpo_vs_trl.py --trl-python VENV/bin/python > benchmarks/results/dpo_vs_trl.json
    python benchmarks/dpo_vs_trl.py --trl-python VENV/bin/python --shape lifelike --family qwen3_vl

Run it in this project's environment. VENV is one with the extra `oracle` (torch, TRL, PEFT); the model
and pairs are created there. Each round runs TRL with its defaults, TRL with its fastest setting (gradient
checkpointing off), this project on the same rows in file order, in its own order (the same rows over a
pass; --steps should be passes), with reference log-probs stored beforehand and, where the tower is frozen,
with its features stored as well: in sequence, so that temporary slowdowns of the machine
affect all of them; the ratios are between medians over rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = ("llava_next", "llava_onevision", "qwen3_vl")
SIDES = ("trl_default", "trl_best", "mllm_align", "shuffled", "reference_stored", "stored")


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
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--family", choices=FAMILIES, default="llava_next")
    parser.add_argument("--shape", choices=["tiny", "lifelike"], default="tiny")
    parser.add_argument("--work", type=Path, help="folder for model and pairs; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not (work / "model").exists():
            make = [args.trl_python, str(HERE / "make_model.py"), "--out", str(work)]
            make += ["--family", args.family, "--shape", args.shape]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        results = {mode: compare(args, work, mode) for mode in args.modes}
    print(json.dumps(results, indent=1))


def compare(args: argparse.Namespace, work: Path, mode: str) -> dict:
    common = ["--model", str(work / "model"), "--data", str(work / "pairs" / "pairs.jsonl")]
    common += ["--mode", mode, "--steps", str(args.steps), "--dtype", args.dtype]
    trl, ours = (args.trl_python, "trl_dpo.py", *common), (sys.executable, "ours_dpo.py", *common)
    sides = {
        "trl_default": (*trl, "--gc", "1"),
        "trl_best": (*trl, "--gc", "0"),
        "mllm_align": ours,
        "shuffled": (*ours, "--shuffle", "--warmup", "0"),
        "reference_stored": (*ours, "--stored", "reference"),
        "stored": (*ours, "--stored", "reference", "features"),
    }
    # Full fine-tuning trains the tower, whose features then change with every step.
    names = [name for name in sides if name in args.sides and (mode == "lora" or name != "stored")]
    rounds: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            rounds[name].append(run(*sides[name]))
            print(mode, name, rounds[name][-1]["pairs_per_s"], file=sys.stderr, flush=True)
    pairs = {name: [r["pairs_per_s"] for r in each] for name, each in rounds.items()}
    peak = {name: round(max(r["peak_rss_mib"] for r in each)) for name, each in rounds.items()}
    result = {"pairs_per_s": pairs, "peak_rss_mib": peak}
    if "trl_best" in pairs:
        best = statistics.median(pairs["trl_best"])
        ratio = {name: round(statistics.median(each) / best, 2) for name, each in pairs.items()}
        result |= {"ratio_to_trl_best": ratio}
    return result | {"last_round": {name: each[-1] for name, each in rounds.items()}}


if __name__ == "__main__":
    main()
