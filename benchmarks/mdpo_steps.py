"""What a step of mDPO costs beside one of DPO, on the same pairs; JSON on stdout.

    python benchmarks/mdpo_steps.py > benchmarks/results/mdpo_steps.json

Both train in turn, as `mllm-align train` does, a small random LLaVA 1.6 on the demo's pictures. A pair of
mDPO has a second prompt, with a crop of its image, continued by the chosen response: of P prompt and R
response tokens it runs 2 P + 3 R in place of P + 2 R, and twice the tiles. CPU seconds, of all threads, are
less disturbed by others on the machine than seconds.
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

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from machine import machine, other_cpu_seconds

from mllm_align import DPO, MDPO, Callback, Config, DataConfig, LoraConfig, load, train
from mllm_align.testbed.demo import make_model, make_pairs


class Watch(Callback):
    """Notes when each step was done."""

    def __init__(self):
        self.seen: list[tuple[float, float]] = []

    def on_step(self, metrics):
        self.seen.append((time.perf_counter(), time.process_time()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    bundle = load(make_model(work / "model", hidden=256, mlp=688, layers=4, heads=8, vision_hidden=128))
    data = make_pairs(work / "demo", count=64, held_out=1)
    common = {"lora": LoraConfig(rank=16), "data": DataConfig(shapes=1), "batch_size": 8, "log_every": 1}
    configs = {
        name: Config(objective=each, steps=args.steps, **common)
        for name, each in (("dpo", DPO()), ("mdpo", MDPO()))
    }

    def turn(name: str, number: int) -> dict[str, float]:
        watch, other = Watch(), other_cpu_seconds()
        with redirect_stdout(sys.stderr):
            train(configs[name], bundle, data, work / f"{name}-{number}", callbacks=[watch])
        steps = [[b - a for a, b in zip(*each, strict=True)] for each in pairwise(watch.seen)]
        wall, cpu = (statistics.median(each) for each in zip(*steps, strict=True))
        others = round(other_cpu_seconds() - other, 1)
        return {"s": round(wall, 4), "cpu_s": round(cpu, 4), "others_cpu_s": others}

    rounds = [{name: turn(name, number) for name in configs} for number in range(args.rounds)]
    ratios = {
        key: round(statistics.median(each["mdpo"][key] / each["dpo"][key] for each in rounds), 2)
        for key in ("s", "cpu_s")
    }
    start = json.loads((work / "mdpo-0" / "log.jsonl").read_text().splitlines()[0])
    print(
        json.dumps(
            {
                **machine(),
                "shape": start["shapes"],
                "batch": 8,
                "a_step": rounds,
                "mdpo_by_dpo": ratios,
                "mdpo_by_two_dpo": {key: round(value / 2, 2) for key, value in ratios.items()},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
