"""This project's side of the generation benchmarks; one JSON object on stdout.

    bdhs     the first iteration of BDHS, guided, 99% of the image embeddings masked
    sample   K responses of 64 tokens to every prompt, none ended before
    rollout  K responses of up to 96 tokens to every prompt, by the program that online training runs

`--write` makes the job that both sides do: records from the pairs of make_model.py (FOLDER/records.jsonl)
and, from what this project's decoder is given, one row for each continuation with the ids it stands on, the
masked places among them and the tokens that greedy decoding gives here (FOLDER/bdhs.json, sample.json).

Without it the job is timed at temperature 1: from image files to tokens, the chosen responses' cuts and the
making of the rejected ones included, texts tokenized before. An untimed pass before compiles; every pass
has a new encoder, as one keeps the pixels that it has read. A rollout has its pixels ready, as training
has: it is timed from there to the tokens on the host. With `--turns` it takes one pass for each line on
stdin.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine, other_cpu_seconds, take_turns

from mllm_align.config import BDHSConfig, DataConfig, SamplingConfig
from mllm_align.data.batches import Batches
from mllm_align.generation.bdhs import BDHS
from mllm_align.generation.decode import Generator
from mllm_align.generation.respond import respond
from mllm_align.generation.rollout import rollout_program
from mllm_align.generation.sampling import random_key
from mllm_align.generation.similarity import Lexical
from mllm_align.models.bundle import load
from mllm_align.prepare import prepare
from mllm_align.sharding import assemble, batch_sharding, replicated

SENTENCE_WORDS = 12  # about 20 tokens
PACKAGES = ("mllm-align", "jax", "jaxlib", "flax", "transformers", "numpy", "pillow")


class Recorder(Generator):
    """A decoder that remembers what it was asked and what it answered."""

    seen: list[tuple]

    def stream(self, ask, stop_mask):
        given = []

        def told():
            if (row := ask()) is not None:
                given.append(row)
            return row

        for ended in super().stream(told, stop_mask):
            self.seen += [(given[number], tokens) for number, tokens in ended]
            yield ended


class Guided:
    """bdhs: calling it completes every sentence."""

    limit = 24

    def __init__(self, bundle, generator: Recorder, data: Path, sampling: SamplingConfig, samples: int):
        self.encoder, self.records, _ = prepare(bundle, data, DataConfig(), responses=1)
        config = BDHSConfig(iterations=1, sentence_tokens=self.limit, sampling=sampling)
        self.generator, self.maker = (
            generator,
            BDHS(generator, self.encoder, config, Lexical(), config.seed),
        )
        self.stop_ids = np.flatnonzero(self.maker.stop_mask)

    def __call__(self) -> list[np.ndarray]:
        self.generator.seen = []
        self.made = list(self.maker(self.records))
        return [tokens for _, out in self.generator.seen for tokens in out]

    def rows(self) -> list[dict]:
        """Of the job: one for each sentence."""
        self()
        rows = []
        # with a single iteration, results come in the order of the decoder's rows
        for made, (row, out) in zip(self.made, self.generator.seen, strict=True):
            for fork, tokens in zip(row.forks, out, strict=True):
                before = row.prefix.order[: fork.at]
                ids = np.full(
                    row.prefix.order[fork.at], self.encoder.image_token
                )  # what is absent is image
                ids[before] = row.prefix.tokens[: fork.at]
                hidden = np.setdiff1d(np.arange(len(ids)), before)
                rows.append(job_row(made.index, [*ids, *fork.forced], hidden, tokens))
        return rows


class Free:
    """sample: calling it draws every response."""

    limit = 64

    def __init__(self, bundle, generator: Recorder, data: Path, sampling: SamplingConfig, samples: int):
        self.encoder, self.records, _ = prepare(bundle, data, DataConfig(), responses=0)
        self.encoder.eos_ids, self.stop_ids = frozenset(), ()  # so that all responses reach the limit
        self.generator, self.sampling, self.samples = generator, sampling, samples

    def __call__(self) -> list[np.ndarray]:
        self.generator.seen = []
        out = respond(self.generator, self.encoder, self.records, self.sampling, self.samples)
        return [tokens for each in out for tokens in each]

    def rows(self) -> list[dict]:
        """Of the job: one for each prompt."""
        prompts = [self.encoder.prefix(r).tokens for r in self.records]
        return [job_row(i, ids, (), new) for i, (ids, new) in enumerate(zip(prompts, self(), strict=True))]


class Rolled:
    """rollout: calling it draws every response, at once, with keys of its own each time."""

    limit = 96

    def __init__(self, bundle, data: Path, sampling: SamplingConfig, samples: int, count: int):
        self.encoder, records, _ = prepare(bundle, data, DataConfig(), responses=1)
        self.records, self.bundle, self.samples, self.turn = records[:count], bundle, samples, 0
        padded = Batches(records, self.encoder, size=count, shapes=1, multiple=8)  # as configs/online_*.py
        self.where = batch_sharding(bundle.mesh)
        self.batch = assemble(padded(0).group, self.where)
        eos_mask = self.encoder.eos_mask(bundle.config.decoder.vocab)
        self.stop_ids, self.eos_mask = np.flatnonzero(eos_mask), assemble(eos_mask, replicated(bundle.mesh))
        settings = bundle.config, bundle.mesh, bundle.lora_scale, bundle.dtype, sampling
        self.program = rollout_program(*settings)

    def __call__(self) -> list[np.ndarray]:
        self.turn += 1
        drawn = [[random_key(self.turn, r.record.id, k) for k in range(self.samples)] for r in self.records]
        keys = assemble(np.array(drawn)[None], self.where)
        out = self.program(self.bundle.params, self.bundle.trained, self.batch, keys, self.eos_mask)
        tokens, lengths = (np.asarray(x)[0] for x in out[:2])
        places = np.ndindex(lengths.shape)
        return [tokens[place][: lengths[place]] for place in places]

    rows = Free.rows


TASKS = {"bdhs": Guided, "sample": Free, "rollout": Rolled}


def job_row(record: int, ids, hidden, tokens) -> dict:
    arrays = {"ids": ids, "hidden": hidden, "tokens": tokens}
    return {"record": record, **{name: [*map(int, array)] for name, array in arrays.items()}}


def write_records(folder: Path, count: int) -> None:
    """Records with responses of 3 to 5 sentences, from the words of the pairs."""
    pairs = [json.loads(line) for line in (folder / "pairs" / "pairs.jsonl").read_text().splitlines()]
    words = itertools.cycle(" ".join(pair["chosen"] for pair in pairs).replace(".", "").split())
    with open(folder / "records.jsonl", "w") as file:
        for number, pair in enumerate(pairs[:count]):
            sentences = [itertools.islice(words, SENTENCE_WORDS) for _ in range(3 + number % 3)]
            text = " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences)
            images = [f"pairs/{name}" for name in pair["images"]]
            file.write(json.dumps({"images": images, "prompt": pair["prompt"], "chosen": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--folder", type=Path, required=True, help="what make_model.py wrote; the job")
    parser.add_argument("--model", type=Path, help="default: FOLDER/model")
    parser.add_argument("--data", type=Path, help="default: FOLDER/records.jsonl")
    parser.add_argument("--records", type=int, default=32, help="of rollout: prompts at once")
    parser.add_argument("--turns", action="store_true", help="of rollout: passes when stdin asks")
    parser.add_argument("--write", type=int, metavar="RECORDS", help="write the job of so many records")
    parser.add_argument("--samples", type=int, default=1, help="K of sample")
    parser.add_argument("--batch", type=int, default=8, help="records at once")
    parser.add_argument("--passes", type=int, default=3, help="timed passes over the records")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if args.write and args.data is None:
        write_records(args.folder, args.write)
    task, data = TASKS[args.task], args.data or args.folder / "records.jsonl"
    bundle = load(args.model or args.folder / "model", args.dtype)
    sampling = SamplingConfig(temperature=0.0 if args.write else 1.0, max_tokens=task.limit)
    decoder = Recorder(bundle, sampling, args.batch)

    def fresh() -> Guided | Free | Rolled:
        if task is Rolled:
            return Rolled(bundle, data, sampling, args.samples, args.write or args.records)
        return task(bundle, decoder, data, sampling, args.samples)

    if args.write:
        work = fresh()
        rows, images = work.rows(), [str(record.record.images[0].path) for record in work.records]
        job = {"limit": task.limit, "stops": [*map(int, work.stop_ids)], "images": images, "rows": rows}
        (args.folder / f"{args.task}.json").write_text(json.dumps(job))
        lengths = [len(row["ids"]) for row in rows]
        print(json.dumps({"rows": len(rows), "prompt_tokens": [min(lengths), max(lengths)]}))
        return

    if args.turns:
        work = fresh()
        work()
        take_turns(work)
        return

    began = time.perf_counter()
    fresh()()
    warmup = time.perf_counter() - began
    made, wall, cpu, other = [], 0.0, 0.0, 0.0
    for _ in range(args.passes):
        work = fresh()
        before, busy, began = other_cpu_seconds(), time.process_time(), time.perf_counter()
        made += work()
        wall += time.perf_counter() - began
        cpu += time.process_time() - busy
        other += other_cpu_seconds() - before
    tokens = sum(map(len, made))
    result = {
        "side": "mllm_align",
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "tokens_per_s": round(tokens / wall, 1),
        "rows_per_s": round(len(made) / wall, 2),
        "tokens": tokens,
        "rows": len(made),
        "total_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "warmup_s": round(warmup, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "other_cpu_s": round(other, 2),
        **machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
