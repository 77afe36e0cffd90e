"""Answers per second where questions share images, beside one prefill for each question; JSON on stdout.

    python benchmarks/make_model.py --out WORK      # needs the extra `oracle`
    python benchmarks/shared_images.py --work WORK > benchmarks/results/shared_images.json

POPE's form: short questions, many about each image, answers of a few tokens. The model's weights are
random, so most of its vocabulary ends an answer. Both ways take turns in one process; answers that differ
are counted (a near tie may go either way). Seconds include reading the images.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from machine import machine, other_cpu_seconds

from mllm_align import load
from mllm_align.config import DataConfig, SamplingConfig
from mllm_align.generation import respond as module
from mllm_align.generation.decode import Generator
from mllm_align.prepare import prepare

THINGS = ["dog", "cat", "car", "tree", "chair", "table", "person", "bird", "boat"]
THINGS += ["cup", "book", "lamp", "phone", "clock", "sofa", "fork", "knife", "plate"]
FORM = "Is there a {} in the image?\nAnswer the question using a single word or phrase."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    bundle = load(args.work / "model")
    pictures = sorted((args.work / "pairs").rglob("*.png"))[: args.images]
    asked = [
        {"prompt": FORM.format(thing), "images": [str(path)], "id": f"{path.stem} {thing}"}
        for path in pictures
        for thing in THINGS
    ]
    sampling = SamplingConfig(temperature=0.0, max_tokens=128)
    encoder, records, _ = prepare(bundle, asked, DataConfig(), responses=0)
    encoder.eos_ids = frozenset(i for i in range(bundle.config.decoder.vocab) if i % 8)
    generator, usual = Generator(bundle, sampling, args.batch), module.FORK_TOKENS

    def turn(fork_tokens: int) -> tuple[list, float, float]:
        module.FORK_TOKENS, encoder._kept, encoder._room = fork_tokens, {}, 0  # images are read every time
        other, began = other_cpu_seconds(), time.perf_counter()
        out = module.respond(generator, encoder, records, sampling, what=None)
        return [each[0].tolist() for each in out], time.perf_counter() - began, other_cpu_seconds() - other

    ways: dict[str, int] = {"a_prefill_each": 1, "shared": usual}
    answers = {name: turn(size)[0] for name, size in ways.items()}  # compiles
    rounds = [{name: turn(size)[1:] for name, size in ways.items()} for _ in range(args.rounds)]
    seconds = {name: statistics.median(each[name][0] for each in rounds) for name in ways}
    differ = sum(one != two for one, two in zip(*answers.values(), strict=True))
    print(
        json.dumps(
            {
                **machine(),
                "questions": len(records),
                "images": len(pictures),
                "prompt_tokens": [
                    min(r.shape.prefix for r in records),
                    max(r.shape.prefix for r in records),
                ],
                "answer_tokens": statistics.mean(map(len, answers["shared"])),
                "answers_that_differ": differ,
                "answers_per_s": {name: round(len(records) / each, 2) for name, each in seconds.items()},
                "ratio": round(seconds["a_prefill_each"] / seconds["shared"], 2),
                "rounds_s": [{name: round(each[name][0], 2) for name in ways} for each in rounds],
                "others_cpu_s": [{name: round(each[name][1], 2) for name in ways} for each in rounds],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
