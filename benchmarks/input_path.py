"""Records per second and start-up with image files, Parquet and ArrayRecord; JSON on stdout.

    python benchmarks/input_path.py --records 100000 > benchmarks/results/input_path.json

Makes that many pairs with a JPEG of 640 x 480 pixels each (once, in --folder): as JSONL with image files,
as `data mix` writes Parquet, and as `data build` writes ArrayRecord. Each is read by a process of its own.
It reads all records and encodes them, with nothing kept, and with what that left beside the data. Then it
reads images of records drawn at random: their bytes alone, from the disk and from the system's cache, and
their pixels as LLaVA-1.5 takes them. The JPEG decoder is timed by itself, too. At the end, image files and
ArrayRecord are read from the disk in turn. Figures are of seconds on the clock; those with `cpu` of the
process's own CPU seconds, which other programs don't change.
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from machine import machine, other_cpu_seconds
from PIL import Image
from startup import WORDS

from mllm_align.cli.shared import open_encoder
from mllm_align.config import DataConfig
from mllm_align.curation.build import build
from mllm_align.curation.mix import mix
from mllm_align.data import table
from mllm_align.data.images import ImageSource, load_rgb
from mllm_align.data.mixture import Weighted
from mllm_align.data.records import Record
from mllm_align.prepare import read_data
from mllm_align.testbed.demo import make_model

FORMS = {"image files": "pairs.jsonl", "Parquet": "pairs.parquet", "ArrayRecord": "built"}
PICTURES = 64  # different ones


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--drawn", type=int, default=4000, help="records whose images are read")
    parser.add_argument("--folder", type=Path, help="where model and data are made, and found again")
    parser.add_argument("--form", choices=FORMS, help="read this one alone, in this process")
    args = parser.parse_args()
    if args.form is not None:
        print(json.dumps(measured(args.folder, args.form, args.drawn)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        sizes = make(folder, args.records)
        command = [sys.executable, __file__, "--folder", folder, "--drawn", str(args.drawn), "--form"]
        found = {}
        for form in FORMS:
            done = subprocess.run([*command, form], check=True, stdout=subprocess.PIPE, text=True)
            found[form] = {"bytes": sizes[form], **json.loads(done.stdout)}
        turns = in_turns(folder, args.drawn)
    found = {"machine": machine(), "records": args.records, "forms": found, "from_disk_in_turns": turns}
    print(json.dumps(found, indent=1))


# ---- the data ----------------------------------------------------------------------------------------


def make(folder: Path, count: int) -> dict[str, int]:
    """The data in every form; bytes of each."""
    data = folder / FORMS["image files"]
    if not data.exists():
        (folder / "images").mkdir(parents=True)
        make_model(folder / "model", "llava", image_size=336)
        rng = np.random.default_rng(0)
        pictures = [jpeg(rng) for _ in range(PICTURES)]

        def text(words: int) -> str:
            return " ".join(rng.choice(WORDS, words))

        with open(data, "w", encoding="utf-8") as file:
            for i in range(count):
                name = f"images/{i:07}.jpg"
                (folder / name).write_bytes(marked(pictures[i % PICTURES], i))
                chosen, rejected = (text(int(n)) for n in rng.integers(30, 90, 2))
                row = {"images": [name], "prompt": text(12), "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")
    if not (folder / FORMS["Parquet"]).exists():
        mix([Weighted(data, 1.0)], folder / FORMS["Parquet"])
    if not (folder / FORMS["ArrayRecord"]).exists():
        build([data], folder / FORMS["ArrayRecord"])
    pictures = sum(file.stat().st_size for file in (folder / "images").iterdir())
    built = sum(file.stat().st_size for file in (folder / FORMS["ArrayRecord"]).iterdir())
    parquet = (folder / FORMS["Parquet"]).stat().st_size
    return {"image files": data.stat().st_size + pictures, "Parquet": parquet, "ArrayRecord": built}


def jpeg(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    few = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    few.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def marked(data: bytes, number: int) -> bytes:
    """With a comment that makes it another file."""
    return data[:2] + b"\xff\xfe\x00\x0a" + f"{number:08}".encode() + data[2:]


# ---- what is measured --------------------------------------------------------------------------------


def measured(folder: Path, form: str, drawn: int) -> dict:
    data = folder / FORMS[form]
    beside = data if data.is_dir() else data.parent
    shutil.rmtree(beside / ".mllm_align", ignore_errors=True)
    _, encoder = open_encoder(folder / "model", DataConfig())
    table.MIN_PARALLEL = 10**9  # in this process, whose CPU time is told
    found, other = {}, other_cpu_seconds()

    def timed(name: str, work: Callable[[], list]) -> list:
        cpu, began = time.process_time(), time.perf_counter()
        done = work()
        found[f"{name}_s"], found[f"{name}_cpu_s"] = time.perf_counter() - began, time.process_time() - cpu
        return done

    records = timed("read", lambda: read_data(data, DataConfig(), 2))
    timed("encode_first", lambda: list(table.encode_each(records, encoder, 2, beside)))
    encoded = timed("encode_again", lambda: list(table.encode_each(records, encoder, 2, beside)))
    shutil.rmtree(beside / ".mllm_align", ignore_errors=True)
    rng = np.random.default_rng(1)
    few = [encoded[i] for i in rng.choice(len(encoded), min(drawn, len(encoded)), replace=False)]
    some = [each.record for each in few]
    few = few[: len(few) // 4]
    forget(data, some)
    found |= rates("from_disk", some, image_bytes)
    found |= rates("bytes", some, image_bytes)
    with ThreadPoolExecutor(2) as pool:
        began = time.perf_counter()
        held = list(pool.map(image_bytes, some))
        found["bytes_two_threads_per_s"] = len(some) / (time.perf_counter() - began)
    encoder._room = 0  # pixels are made every time
    found |= rates("pixels", few, encoder.pixels) | rates("decoded", held[: len(few)], decoded)
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found["other_cpu_s"] = other_cpu_seconds() - other
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def rates(name: str, items: list, work: Callable) -> dict[str, float]:
    """Items per second on the clock, and per CPU second."""
    cpu, began = time.process_time(), time.perf_counter()
    for item in items:
        work(item)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {f"{name}_per_s": len(items) / seconds, f"{name}_per_cpu_s": len(items) / cpu_s}


def in_turns(folder: Path, drawn: int, rounds: int = 5) -> dict[str, list[float]]:
    """Images a second from the disk, of two forms in turn: other programs disturb both alike."""
    kept = {}
    for form in ("image files", "ArrayRecord"):
        records = read_data(folder / FORMS[form], DataConfig(), 2)
        places = np.random.default_rng(2).permutation(len(records))[: rounds * drawn]
        kept[form] = [records[i] for i in places]
    found: dict[str, list[float]] = {form: [] for form in kept}
    for turn in range(rounds):
        for form, records in kept.items():
            some = records[turn::rounds]
            forget(folder / FORMS[form], some)
            found[form].append(round(rates("disk", some, image_bytes)["disk_per_s"]))
    return found


def image_bytes(record: Record) -> bytes:
    (source,) = record.images
    return source.read() or b""


def decoded(data: bytes) -> Image.Image:
    """What no form of the data takes away: the JPEG decoder."""
    return load_rgb(ImageSource(data=data))


def forget(data: Path, records: list[Record]) -> None:
    """Take what will be read out of the system's cache."""
    os.sync()
    for file in files(data, records):
        with closing(os.fdopen(os.open(file, os.O_RDONLY))) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files(data: Path, records: list[Record]) -> Iterator[Path]:
    if data.suffix == ".jsonl":
        yield from (source.path for each in records for source in each.images if source.path)
    else:
        yield from data.iterdir() if data.is_dir() else [data]


if __name__ == "__main__":
    main()
