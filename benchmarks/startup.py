"""Time of a run on many records until its first step, and its memory; JSON on stdout.

    python benchmarks/startup.py --records 100000 > benchmarks/results/startup.json

Makes a tiny model and that many pairs with a small picture each (once, in --folder), then starts `train`
on them twice: the second start reads the cache of the first. Time is from the start of the process to the
line `start` of log.jsonl, which is written before the first step is compiled; memory is the peak of all
processes of the run together.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from PIL import Image

from mllm_align.testbed.demo import make_model

ROOT = Path(__file__).resolve().parents[1]
WORDS = (
    "red",
    "blue",
    "circle",
    "square",
    "picture",
    "shows",
    "two",
    "dogs",
    "on",
    "the",
    "table",
    "small",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where model and data are made, and found again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        make(folder, args.records)
        for kept in folder.glob(".mllm_align/*"):
            kept.unlink()
        starts = [start(folder, Path(scratch) / f"run{i}") for i in range(2)]
    print(json.dumps({"machine": machine(), "records": args.records, "starts": starts}, indent=1))


def make(folder: Path, count: int) -> None:
    if (folder / "pairs.jsonl").exists():
        return
    (folder / "images").mkdir(parents=True)
    make_model(folder / "model")
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS, words))

    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for i in range(count):
            name = f"images/{i:07}.{('jpg', 'png')[i % 2]}"
            few = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(few).resize((64, 48)).save(folder / name)
            chosen, rejected = (text(int(n)) for n in rng.integers(30, 90, 2))
            row = {"images": [name], "prompt": text(12), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


def start(folder: Path, out: Path) -> dict:
    """One run of two steps."""
    command = [sys.executable, "-m", "mllm_align.cli", "train", str(ROOT / "configs" / "dpo_tiny.py")]
    command += ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--out", str(out)]
    began, peak = time.time(), 0
    process = subprocess.Popen([*command, "--steps", "2"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"train ended with status {process.returncode}")
    events = {e["event"]: e["time"] for e in map(json.loads, (out / "log.jsonl").read_text().splitlines())}
    shutil.rmtree(out)
    return {
        "to_first_step_s": round(events["start"] - began, 2),
        "to_end_s": round(time.time() - began, 2),
        "peak_gb": round(peak / 1e9, 3),
    }


def resident(pid: int) -> int:
    """Bytes of a process and all below it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):  # it has ended
        return 0
    return pages * 4096 + sum(resident(int(child)) for child in below)


if __name__ == "__main__":
    main()
