"""Generated tokens per second, this project against transformers, alternating on one machine; JSON on
stdout.

    python benchmarks/generate_vs_hf.py --hf-python VENV/bin/python > benchmarks/results/generate_vs_hf.json

Run it in this project's environment. VENV is one with the extra `oracle` (torch, transformers); the model
and images are created there. Three comparisons: the first iteration of BDHS, and one or four samples of 64
tokens per prompt. The sides alternate. In the first round, transformers also decodes greedily and must
produce the same tokens as this project, and it tries several batch sizes; later rounds use the fastest.
Ratios are between medians over rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NEAR_TIE = 1e-4
COMPARISONS = {"bdhs": ("bdhs", 1), "sample_1": ("sample", 1), "sample_4": ("sample", 4)}


def run(python: str, script: str, *options: object) -> dict:
    command = [python, str(HERE / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hf-python", required=True, help="python of the environment with transformers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--passes", type=int, default=3, help="timed passes of ours; one of transformers'")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16, 32], help="tried by transformers")
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, default=[*COMPARISONS])
    parser.add_argument("--shape", choices=["tiny", "lifelike"], default="tiny")
    parser.add_argument("--work", type=Path, help="folder for model and data; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if not (work / "model").exists():
            make = [args.hf_python, HERE / "make_model.py", "--out", work, "--shape", args.shape]
            make += ["--pairs", str(args.records)]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        jobs = {
            task: run(sys.executable, "ours_generate.py", task, "--folder", work, "--write", args.records)
            for task in sorted({COMPARISONS[name][0] for name in args.compare})
        }
        results = {name: compare(args, work, *COMPARISONS[name]) for name in args.compare}
    print(json.dumps({"jobs": jobs, **results}, indent=1))


def check(name: str, greedy: dict) -> None:
    """Check that tokens differ only where transformers' two largest logits are almost equal."""
    if any(lead > NEAR_TIE for lead in greedy["leads"]):
        sys.exit(f"{name}: greedy tokens differ: {greedy}")


def kinds(task: str) -> tuple[str, ...]:
    """What a row's image may cost transformers (see hf_generate.py); a prompt has a row of its own."""
    return ("row", "record", "dropped") if task == "bdhs" else ("row",)


def compare(args: argparse.Namespace, work: Path, task: str, samples: int) -> dict:
    common = [task, "--folder", work, "--samples", samples]
    peers = {f"transformers_{kind}": [*common, "--images", kind] for kind in kinds(task)}
    batch = {name: ["--check", "--batch", *args.batch] for name in peers}
    rounds: dict[str, list[dict]] = {name: [] for name in [*peers, "mllm_align"]}
    for _ in range(args.rounds):
        for name, options in peers.items():
            done = run(args.hf_python, "hf_generate.py", *options, *batch[name])
            if done["greedy"]:
                check(name, done["greedy"])
            batch[name] = ["--batch", done["best_batch"]]
            rounds[name].append(done)
        done = run(sys.executable, "ours_generate.py", *common, "--passes", args.passes)
        rounds["mllm_align"].append(done)
        last = {name: each[-1]["tokens_per_s"] for name, each in rounds.items()}
        print(task, samples, last, file=sys.stderr, flush=True)
    speed = {name: [r["tokens_per_s"] for r in each] for name, each in rounds.items()}
    median = {name: statistics.median(each) for name, each in speed.items()}
    return {
        "greedy": {name: rounds[name][0]["greedy"] for name in peers},
        "tokens_per_s": speed,
        "rows_per_s": {name: [r["rows_per_s"] for r in each] for name, each in rounds.items()},
        "ratio": {name: round(median["mllm_align"] / median[name], 2) for name in peers},
        "first_round": {name: each[0] for name, each in rounds.items()},
        "last_round": {name: each[-1] for name, each in rounds.items()},
    }


if __name__ == "__main__":
    main()
