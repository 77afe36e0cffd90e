"""How much of a batch is padding, and what ways of making batches do about it; a table on stdout.

    python benchmarks/padding.py [--records 10000] [--batch 32] [--multiple 128]

No model and no data are needed: lengths alone. Sizes of images are mixed as said below and become tokens by
LLaVA-1.6's own layout; texts have log-normal lengths. The sets' files were not at hand: these figures have
the shape of the sets, as far as their papers and cards tell, and are no measurement of the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from unittest import mock

import numpy as np

from mllm_align.batch import Shape
from mllm_align.data.batches import Batches
from mllm_align.data.encode import Encoded
from mllm_align.data.layout import counts
from mllm_align.models.families.llava.presets import LLAVA_16
from mllm_align.models.families.registry import family_of
from mllm_align.sizes import round_up, rounded
from mllm_align.training.flops import group_flops, train_flops

MODEL = LLAVA_16["llava-1.6-7b"]
ROWS = 8, 16  # that a batch is packed into: one for each device
Batch = tuple[Shape, Sequence[int]]

# Width and height of COCO's images and their share. The rest have a longer side of 640, the other of 360 to
# 560: 90% of its images have a height by width of 0.6 to 1.5.
COCO = {
    (640, 480): 0.24,
    (480, 640): 0.08,
    (640, 427): 0.2,
    (427, 640): 0.08,
    (500, 375): 0.06,
    (375, 500): 0.02,
}
COCO |= {(640, 360): 0.03, (612, 612): 0.02, (500, 333): 0.03, (333, 500): 0.01}


@dataclass(frozen=True)
class Like:
    """Lengths of a set, in tokens. text: of the prompt beside the image; chosen: of the response; each a
    mean and a deviation. apart: deviation of the logarithm of rejected by chosen length. other: share of
    images that are not COCO's, of any shape."""

    text: tuple[float, float]
    chosen: tuple[float, float]
    apart: float
    other: float


SETS = {
    "POVID": Like((45, 20), (100, 55), apart=0.08, other=0.0),  # rejected: the chosen one, corrupted
    "RLHF-V": Like((45, 25), (70, 60), apart=0.15, other=0.5),  # chosen: the rejected one, corrected
    "RLAIF-V": Like((50, 30), (120, 80), apart=0.35, other=0.5),  # two samples of one model
    "VLFeedback": Like((70, 60), (150, 120), apart=0.8, other=0.7),  # two of twelve models
}


def records(like: Like, count: int, seed: int = 0) -> tuple[list[Encoded], np.ndarray]:
    """Records by their lengths alone, and the lengths of chosen and rejected [N, 2]."""
    rng = np.random.default_rng(seed)
    layout = family_of(MODEL).layout(MODEL)
    texts, chosen = (_log_normal(rng, *each, count) for each in (like.text, like.chosen))
    rejected = chosen * np.exp(rng.normal(0, like.apart, count))
    answers = np.clip(np.stack([chosen, rejected], 1), 4, 1024).astype(int)
    none, out = np.zeros(0, np.int32), []
    for index in range(count):
        width, height = _image(rng, like.other)
        tiles, _, embeddings = counts(layout, height, width, 1)
        prompt = embeddings + int(np.clip(texts[index], 15, 1000))
        shape = Shape(prompt, int(answers[index].max()), tiles)
        out.append(Encoded(None, none, (none, none), (), shape, index))  # type: ignore[arg-type]
    return out, answers


def _log_normal(rng: np.random.Generator, mean: float, deviation: float, count: int) -> np.ndarray:
    variance = np.log(1 + (deviation / mean) ** 2)
    return np.exp(rng.normal(np.log(mean) - variance / 2, variance**0.5, count))


def _image(rng: np.random.Generator, other: float) -> tuple[int, int]:
    """Width and height."""
    if rng.random() < other:
        area, ratio = 270_000 * np.exp(rng.normal(0, 0.7)), np.exp(rng.normal(0.1, 0.45))
        return max(int((area * ratio) ** 0.5), 40), max(int((area / ratio) ** 0.5), 40)
    drawn = int(np.searchsorted(np.cumsum(list(COCO.values())), rng.random()))
    if drawn < len(COCO):
        return list(COCO)[drawn]
    shorter = int(rng.uniform(360, 560))
    return (640, shorter) if rng.random() < 0.72 else (shorter, 640)


# ---- ways of making batches --------------------------------------------------------------------------


def made(data: list[Encoded], size: int, multiple: int, **options) -> list[Batch]:
    """An epoch as `Batches` makes it."""
    batches = Batches(data, None, size=size, multiple=multiple, **options)  # type: ignore[arg-type]
    return [batches.plan(step) for step in range(batches.per_epoch)]


def equal_parts(shapes, responses, steps, multiple, *_) -> tuple[Shape, ...]:
    """The ladder as it was: records ranked by tokens and cut into equal parts, a rung the union of all
    up to its part."""
    ranked = sorted((rounded(s, multiple) for s in shapes), key=lambda s: s.prefix + responses * s.response)
    cuts = [len(ranked) * (i + 1) // steps for i in range(steps)]
    return tuple(dict.fromkeys(reduce(Shape.union, ranked[:cut]) for cut in cuts if cut))


def by_rank(data: list[Encoded], size: int, multiple: int, shapes: int) -> list[Batch]:
    with mock.patch("mllm_align.data.batches.ladder", equal_parts):
        return made(data, size, multiple, shapes=shapes, shuffle=True)


def windows(data: list[Encoded], size: int, multiple: int, window: int) -> list[Batch]:
    """Of a random order, `window` batches at a time sorted by length; each has the shape that it needs."""
    order, out = np.random.default_rng(0).permutation(len(data)), []
    for start in range(0, len(order), window * size):
        part = sorted(order[start : start + window * size], key=lambda r: _tokens(data[r].shape))
        for i in range(0, len(part), size):
            here = part[i : i + size]
            out.append((rounded(reduce(Shape.union, (data[r].shape for r in here)), multiple), here))
    return out


def _tokens(shape: Shape) -> int:
    return shape.prefix + 2 * shape.response


# ---- what is counted ---------------------------------------------------------------------------------


@cache
def step_flops(tiles: int, prompt: int, answers: tuple[int, ...]) -> float:
    """Of a step of DPO with LoRA and a live reference on a row of these lengths."""
    forward = group_flops(MODEL, tiles, prompt, answers)
    return train_flops(forward, lora=True, tower=False, reference=True)


def shares(data: list[Encoded], answers: np.ndarray, batches: list[Batch], size: int) -> list[float]:
    """Padding's share of the tokens of prompts, of those of responses, of all, and of a step's FLOPs."""
    prompts = np.array([each.shape.prefix for each in data])
    tiles = [each.shape.tiles for each in data]
    padded_prompts = sum(size * shape.prefix for shape, _ in batches)
    padded_answers = sum(size * 2 * shape.response for shape, _ in batches)
    real = zip(tiles, prompts.tolist(), map(tuple, answers.tolist()), strict=True)
    flops = sum(step_flops(*each) for each in real)
    padded_flops = sum(size * step_flops(s.tiles, s.prefix, (s.response,) * 2) for s, _ in batches)
    whole = padded_prompts + padded_answers
    parts = (prompts.sum(), padded_prompts), (answers.sum(), padded_answers)
    both = *parts, (prompts.sum() + answers.sum(), whole), (flops, padded_flops)
    return [float(1 - each / padded) for each, padded in both]


def packed(data: list[Encoded], answers: np.ndarray, size: int, multiple: int, rows: int) -> float:
    """Padding, of all tokens, of random batches whose records are packed into so many rows, the longest
    record first, each into the row with most room. Rows have one of four lengths, equal parts of what the
    batches need."""
    lengths = np.array([each.shape.prefix for each in data]) + answers.sum(1)
    order, needs = np.random.default_rng(0).permutation(len(data)), []
    for start in range(0, len(order), size):
        filled = np.zeros(rows, int)
        for length in np.sort(lengths[order[start : start + size]])[::-1]:
            filled[filled.argmin()] += length
        needs.append(round_up(int(filled.max()), multiple))
    parts = np.quantile(needs, (0.25, 0.5, 0.75, 1), method="higher")
    padded = rows * parts[np.searchsorted(parts, needs)].sum()
    return float(1 - lengths.sum() / padded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--multiple", type=int, default=128)
    args = parser.parse_args()
    size, multiple = args.batch, args.multiple
    ways: dict[str, Callable[[list[Encoded]], list[Batch]]] = {
        "file order, 4 shapes": lambda data: made(data, size, multiple, shapes=4),
        "equal parts by rank, 4 shapes (before)": lambda data: by_rank(data, size, multiple, 4),
        "equal parts by rank, 8 shapes": lambda data: by_rank(data, size, multiple, 8),
        "sorted in windows of 8 batches": lambda data: windows(data, size, multiple, 8),
        "sorted in windows of 50 batches": lambda data: windows(data, size, multiple, 50),
        "ladder, 4 shapes": lambda data: made(data, size, multiple, shapes=4, shuffle=True),
        "ladder, 8 shapes (default)": lambda data: made(data, size, multiple, shapes=8, shuffle=True),
        "ladder, 16 shapes": lambda data: made(data, size, multiple, shapes=16, shuffle=True),
    }
    print("| lengths as | batches | shapes | prompts | responses | tokens | step FLOPs |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for name, like in SETS.items():
        data, answers = records(like, args.records)
        for way, make in ways.items():
            batches = make(data)
            cells = [f"{100 * share:.1f}%" for share in shares(data, answers, batches, size)]
            found = len({shape for shape, _ in batches})
            print(f"| {name} | {way} | {found} | {' | '.join(cells)} |", flush=True)
        for rows in ROWS:
            share = packed(data, answers, size, multiple, rows)
            print(f"| {name} | packed into {rows} rows | 4 | | | {100 * share:.1f}% | |", flush=True)


if __name__ == "__main__":
    main()
