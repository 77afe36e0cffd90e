"""This project's side of the RLOO benchmark: updates/s and rollout tokens/s of `mllm_align.train`; one JSON
object on stdout.

The same files, rows, order, samples, lengths, reward and trained parameters as trl_rl.py, through the same
call that a user makes. The first pass over the data compiles and counts as warm-up; the timed steps then
see the rows that TRL's see. Wall time runs from the end of one step to the end of the next.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine, other_cpu_seconds
from ours_dpo import PACKAGES, step_clock


def shorter(questions: list) -> list[list[float]]:
    return [[-len(text) / 20 for text in question.responses] for question in questions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=2, help="of TRL: ours adds one pass over the data")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lora-r", type=int, default=16)
    args = parser.parse_args()

    from mllm_align import (
        RLOO,
        Config,
        DataConfig,
        LoraConfig,
        OnlineRewards,
        OptimConfig,
        SamplingConfig,
        Scorer,
        train,
    )

    rows = sum(1 for line in args.data.read_text().splitlines() if line.strip())
    warmup = -(-rows // args.prompts) + args.warmup
    clock = step_clock(warmup)
    config = Config(
        objective=RLOO(responses=args.samples, beta=0.05),
        online=OnlineRewards(Scorer("ours_rl:shorter"), sampling=SamplingConfig(max_tokens=args.tokens)),
        lora=LoraConfig(rank=args.lora_r, alpha=2.0 * args.lora_r),
        optim=OptimConfig(learning_rate=1e-4, projector_learning_rate=0, schedule="constant", warmup=0),
        data=DataConfig(shuffle=False, shapes=8, multiple=16, threads=2),
        batch_size=args.prompts,
        steps=warmup + args.steps,
        dtype="float32",
        remat="none",
        log_every=1,
        save_every=10**9,
    )
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout, out = sys.stderr, sys.stdout  # the log lines are not the result
        train(config, args.model, args.data, Path(folder) / "run", callbacks=[clock])
        sys.stdout = out
    steps = [b - a for a, b in zip(clock.ends[warmup - 1 :], clock.ends[warmup:], strict=False)]
    timed = clock.logged[warmup:]
    lengths = [each["rollout/tokens"] for each in timed]
    parts = ("rollout/seconds", "annotate/seconds", "update/seconds")
    result = {
        "side": "mllm_align",
        "updates_per_s": len(steps) / sum(steps),
        "tokens_per_s": args.prompts * args.samples * sum(lengths) / sum(steps),
        "step_s": steps,
        "mean_length": sum(lengths) / len(lengths),
        "parts_s": {name: sum(each[name] for each in timed) / len(timed) for name in parts},
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "other_cpu_s": round(other_cpu_seconds() - clock.before, 2),
        **machine(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
