"""What a step of each objective costs beside one of DPO, on the same pairs; JSON on stdout.

    python benchmarks/objective_steps.py > benchmarks/results/objective_steps.json
    python benchmarks/objective_steps.py --report      # the JSON of stdin as a table

All train in turn, as `mllm-align train` does, a small random LLaVA 1.6 on the demo's pictures; each step
computes features and reference anew. A pair of P prompt and R response tokens is P + 2 R of DPO; a
second image adds a second prompt, continued by the chosen response: 2 P + 3 R, and twice the tiles. CPU
seconds, of all threads, are less disturbed by others on the machine than seconds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from machine import machine, other_cpu_seconds

from mllm_align import (
    BCO,
    DPO,
    IPO,
    KTO,
    MDPO,
    MRPO,
    ORPO,
    RDPO,
    SFT,
    Callback,
    CHiP,
    Config,
    DataConfig,
    LoraConfig,
    Part,
    SimPO,
    SLiC,
    Sum,
    load,
    train,
)
from mllm_align.curation.retrieve import retrieve
from mllm_align.testbed.demo import make_model, make_pairs

BATCH = 8
MPO = Sum((Part(DPO(), 0.8), Part(BCO(), 0.2), Part(SFT(), 1.0)))
SHAPE: dict[str, Any] = {"hidden": 256, "mlp": 688, "layers": 4, "heads": 8, "vision_hidden": 128}


class Watch(Callback):
    """Notes when each step was done."""

    def __init__(self):
        self.seen: list[tuple[float, float]] = []

    def on_step(self, metrics):
        self.seen.append((time.perf_counter(), time.process_time()))


def objectives(second: Path) -> dict[str, Any]:
    """By name, DPO first. second: the model that is MRPO's other reference."""
    alike = {"dpo": DPO(), "ipo": IPO(), "slic": SLiC(), "kto": KTO(), "mpo": MPO}
    free = {"sft": SFT(), "simpo": SimPO(), "orpo": ORPO()}
    more = {"mrpo": MRPO(references=(str(second),)), "mdpo": MDPO(), "rdpo": RDPO(), "chip": CHiP()}
    return alike | free | more


def measure(steps: int, rounds: int) -> dict[str, Any]:
    work = Path(tempfile.mkdtemp())
    bundle = load(make_model(work / "model", **SHAPE))
    pairs, data = make_pairs(work / "demo", count=64, held_out=1), work / "retrieved.jsonl"
    retrieve([pairs], data, bundle, neighbours=1)
    common = {
        "lora": LoraConfig(rank=16),
        "data": DataConfig(shapes=1),
        "batch_size": BATCH,
        "log_every": 1,
    }
    configs = {
        name: Config(objective=each, steps=steps, **common)
        for name, each in objectives(make_model(work / "second", seed=1, **SHAPE)).items()
    }

    def turn(name: str, number: int) -> dict[str, float]:
        watch, other = Watch(), other_cpu_seconds()
        train(configs[name], bundle, data, work / f"{name}-{number}", callbacks=[watch])
        each = [[b - a for a, b in zip(*both, strict=True)] for both in pairwise(watch.seen)]
        wall, cpu = (statistics.median(seconds) for seconds in zip(*each, strict=True))
        others = round(other_cpu_seconds() - other, 1)
        return {"s": round(wall, 4), "cpu_s": round(cpu, 4), "others_cpu_s": others}

    with redirect_stdout(sys.stderr):
        turns = [{name: turn(name, number) for name in configs} for number in range(rounds)]
    start = json.loads((work / "dpo-0" / "log.jsonl").read_text().splitlines()[0])
    return {
        **machine(),
        "shape": start["shapes"],
        "batch": BATCH,
        "a_step": turns,
        "by_dpo": {name: {key: by_dpo(turns, name, key) for key in ("s", "cpu_s")} for name in configs},
    }


def by_dpo(turns: list[dict[str, dict[str, float]]], name: str, key: str) -> float:
    """The median over the rounds of a step's seconds by DPO's in that round."""
    return round(statistics.median(each[name][key] / each["dpo"][key] for each in turns), 2)


def table(found: dict[str, Any]) -> str:
    """A line for each objective: pairs per second, and what a step takes by DPO's."""
    lines = ["| objective | pairs/s | seconds by DPO's | CPU seconds by DPO's |", "|---|---|---|---|"]
    for name, ratio in found["by_dpo"].items():
        rate = statistics.median(found["batch"] / each[name]["s"] for each in found["a_step"])
        lines.append(f"| `{name}` | {rate:.2f} | {ratio['s']:.2f} | {ratio['cpu_s']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="only print the table of stdin's JSON")
    args = parser.parse_args()
    if args.report:
        print(table(json.load(sys.stdin)))
    else:
        print(json.dumps(measure(args.steps, args.rounds), indent=2))


if __name__ == "__main__":
    main()
