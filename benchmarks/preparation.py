"""Batches per second that a host prepares, at five tiles of 336 pixels a record; JSON on stdout.

    python benchmarks/preparation.py > benchmarks/results/preparation.json

Pairs with a JPEG of 640 x 480 pixels each, which LLaVA-1.6 cuts into five tiles, go from files to padded
batches as training makes them, by one and by more threads; each picture is read and cut anew. The model is
not run.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from input_path import PICTURES, jpeg, marked
from machine import machine, other_cpu_seconds

from mllm_align.cli.shared import open_encoder
from mllm_align.config import DataConfig
from mllm_align.data import table
from mllm_align.data.batches import Batches
from mllm_align.prepare import read_data
from mllm_align.testbed.demo import make_model

BATCH = 4
WORDS = "A red box stands beside a blue ball on a table. "


def make_records(folder: Path, count: int) -> Path:
    """Pairs with a picture file each."""
    rng = np.random.default_rng(0)
    pictures, rows = [jpeg(rng) for _ in range(PICTURES)], []
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(marked(pictures[number % PICTURES], number))
        row = {"prompt": "Describe this picture in detail.", "image": f"{number}.jpg"}
        rows.append(json.dumps(row | {"chosen": WORDS * 8, "rejected": WORDS * 6}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "pairs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    threads = sorted({1, os.cpu_count() or 1})
    with tempfile.TemporaryDirectory() as scratch:
        folder, data = Path(scratch), DataConfig(shapes=1)
        _, encoder = open_encoder(make_model(folder / "model", image_size=336), data)
        encoder._room = 0  # pixels are made every time
        records = read_data(make_records(folder, args.records), data, 2)
        encoded = list(table.encode_each(records, encoder, 2, folder))
        batches = Batches(encoded, encoder, size=BATCH, shapes=1, multiple=data.multiple)
        turns = [{str(count): passed(batches, count) for count in threads} for _ in range(args.rounds)]
    tiles = encoded[0].shape.tiles
    print(json.dumps({**machine(), "tiles": tiles, "batch": BATCH, "by_threads": turns}, indent=2))


def passed(batches: Batches, threads: int) -> dict[str, float]:
    """A pass over the records."""
    other, cpu, began = other_cpu_seconds(), time.process_time(), time.perf_counter()
    count = sum(len(batch.records) for batch in batches.iterate(range(batches.per_epoch), threads, threads))
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    return {
        "records_per_s": round(count / seconds, 2),
        "cpu_ms_per_record": round(1e3 * used / count, 2),
        "others_cpu_s": round(other_cpu_seconds() - other, 1),
    }


if __name__ == "__main__":
    main()
