"""What keeping the blocks in int8 does to log-probs, beside what 16 bits do.

    python benchmarks/int8_error.py --model FOLDER ... --data FILE [--max-records N]

Prints a line of a table for every model: the largest and the mean difference of a response's log-prob from
float32's, in nats per token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mllm_align.config import DataConfig, Dtype
from mllm_align.models.bundle import load
from mllm_align.models.huggingface import open_folder
from mllm_align.training.score import score

WAYS: tuple[tuple[Dtype, bool], ...] = (
    ("float32", False),
    ("float32", True),
    ("bfloat16", False),
    ("bfloat16", True),
)


def logps(model: Path, data: Path, config: DataConfig, dtype: Dtype, int8: bool) -> np.ndarray:
    """Of all responses, per token."""
    rows = score(load(open_folder(model).kept(int8), dtype), data, config=config)
    kinds = "chosen", "rejected"
    return np.array([row[f"{kind}_logp"] / row[f"{kind}_tokens"] for row in rows for kind in kinds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-records", type=int)
    options = parser.parse_args()
    config = DataConfig(shapes=1, max_records=options.max_records)
    print("| model | responses | int8 in float32 | bfloat16 | int8 in bfloat16 |\n|---|--:|---|---|---|")
    for model in options.model:
        exact, *others = (logps(model, options.data, config, *way) for way in WAYS)
        apart = [np.abs(each - exact) for each in others]
        cells = [f"{each.max():.4f}, {each.mean():.4f}" for each in apart]
        print(f"| {model.name} | {len(exact)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
