"""This project's side of the DPO benchmark: pairs/s of `mllm_align.train`; one JSON object on stdout.

The same files, rows, order, batch, learning rate and trained parameters as trl_dpo.py, through the same
call that a user makes. The first pass over the data compiles (that time is reported apart) and counts as
warm-up; the timed steps then see the very rows that TRL's timed steps see; with --shuffle, where they are a
whole pass. Wall time runs from the end of
one step to the end of the next, so waiting for data counts.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine, other_cpu_seconds

ROWS_KEY = "rewards/margin"
PACKAGES = ("mllm-align", "jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")


def step_clock(warmup: int) -> Any:
    """A callback with the end and the figures of every step, and the CPU seconds of other processes before
    the timed ones."""
    from mllm_align import Callback

    class Clock(Callback):
        def __init__(self):
            self.ends, self.logged, self.before = [], [], 0.0

        def on_step(self, metrics: dict) -> None:
            self.ends.append(time.perf_counter())
            self.logged.append(metrics)
            if len(self.ends) == warmup:
                self.before = other_cpu_seconds()

    return Clock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    policies = ["none", "dots", "gate", "qkv", "attention", "full"]
    parser.add_argument("--remat", choices=policies, default="none")
    parser.add_argument("--stored", nargs="*", choices=["reference", "features"], default=[])
    parser.add_argument("--shuffle", action="store_true", help="like sizes together, as by default")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2, help="of TRL: ours adds one pass over the data")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lora-r", type=int, default=16)
    args = parser.parse_args()

    from mllm_align import DPO, Config, DataConfig, LoraConfig, MeshConfig, OptimConfig, train

    rows = sum(1 for line in args.data.read_text().splitlines() if line.strip())
    warmup = -(-rows // args.batch) + args.warmup
    clock = step_clock(warmup)
    config = Config(
        objective=DPO(beta=args.beta),
        # as TRL's peft: LoRA terms alone; full: every parameter, the vision tower too
        lora=LoraConfig(rank=args.lora_r, alpha=2.0 * args.lora_r) if args.mode == "lora" else None,
        freeze=(),
        optim=OptimConfig(
            learning_rate=args.lr,
            projector_learning_rate=0 if args.mode == "lora" else None,
            schedule="constant",
            warmup=0,
        ),
        data=DataConfig(shuffle=args.shuffle, shapes=8, multiple=16, threads=2),
        mesh=MeshConfig(),
        batch_size=args.batch,
        steps=warmup + args.steps,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[args.dtype],
        remat=args.remat,
        **dict.fromkeys(args.stored, "stored"),
        log_every=1,
        save_every=10**9,
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        sys.stdout, out = sys.stderr, sys.stdout  # the log lines are not the result
        train(config, args.model, args.data, Path(folder) / "run", callbacks=[clock])
        sys.stdout = out
        start = json.loads((Path(folder) / "run" / "log.jsonl").read_text().splitlines()[0])
    seconds = [b - a for a, b in zip(clock.ends[warmup - 1 :], clock.ends[warmup:], strict=False)]
    timed = clock.logged[warmup:]
    result = {
        "side": "mllm_align",
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "pairs_per_s": round(args.batch * len(seconds) / sum(seconds), 4),
        "pairs": args.batch * len(seconds),
        "total_s": round(sum(seconds), 3),
        "step_s": [round(s, 3) for s in seconds],
        "before_timing_s": round(clock.ends[warmup - 1] - began, 1),
        "data_wait": round(sum(v["data_wait"] for v in timed) / len(timed), 4),
        "padding": round(sum(v["padding"] for v in timed) / len(timed), 4),
        "flops_per_s": round(sum(v["flops_per_second"] for v in timed) / len(timed)),
        "losses": [round(v["loss"], 6) for v in clock.logged],
        "margins": [round(v[ROWS_KEY], 6) for v in clock.logged],
        "trainable_parameters": start["trained_parameters"],
        "shapes": start["shapes"],
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "other_cpu_s": round(other_cpu_seconds() - clock.before, 2),
        **machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
