"""Few sizes: every padded shape compiles a program, so lengths are rounded up to one of a few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce

import numpy as np

from mllm_align.batch import Shape

LENGTHS = 32  # of prompts, and of responses, that a rung of the ladder may have
WORTH = 0.005  # of the padded tokens; what saves less is not worth its compilation


def round_up(count: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return -(-count // multiple) * multiple


def bucket(count: int, least: int = 8) -> int:
    """The next of least, 3/2 least, 2 least, 3 least, ...: few sizes, none much more than half too large.

    least: a power of two.
    """
    size = least
    while size < count:
        size = size + max(size // 2, 1) if size & (size - 1) == 0 else size // 3 * 4
    return size


def binary_fraction(count: int, limit: int) -> int:
    """A quarter, a half or the whole of `limit`, in multiples of 8: the first that holds `count`."""
    sizes = (round_up(limit * part, 32) // 4 for part in (1, 2, 4))
    return next(size for size in sizes if size >= count)


def half_steps(count: int, usual: int) -> int:
    """`usual`, or so many halves of it more, in multiples of 8, that it holds `count`."""
    return usual + round_up(max(count - usual, 0), round_up(usual, 16) // 2)


def rows_of_part(count: int, rows: int, shards: int) -> int:
    """How many of `count` rows go together: all, in multiples of `shards` and of a quarter of `rows`, but
    at most `rows`."""
    return min(round_up(count, max(rows // 4 // shards, 1) * shards), rows)


def tiles(count: int, embeddings: int) -> int:
    """`count` tiles that run at once in generation; where a tile is a single embedding, and their number
    hence any, one of few."""
    return bucket(count, 64) if count and embeddings == 1 else count


# ---- shapes of batches -------------------------------------------------------------------------------


def rounded(shape: Shape, multiple: int) -> Shape:
    """Token lengths rounded up to a multiple. Responses take a quarter of it: they are shorter."""
    others = tuple((round_up(length, multiple), tiles) for length, tiles in shape.others)
    response = round_up(shape.response, max(multiple // 4, 1))
    return Shape(round_up(shape.prefix, multiple), response, shape.tiles, others)


def ladder(
    shapes: Sequence[Shape],
    responses: int,
    steps: int,
    multiple: int,
    least: int = 1,
    often: Sequence[int] | None = None,
) -> tuple[Shape, ...]:
    """At most `steps` padded shapes, by rising number of tokens; the last holds every record.

    A rung holds the records up to a length of the prompt and a length of the responses, whatever their
    tiles; a record goes to the first rung that holds it. Rungs are added one by one, each where it saves
    most of the padded tokens; then the others are moved to their best places in turn. One is added only if
    it saves `WORTH` of the tokens and takes `least` records. often: how many times each record counts.
    """
    counts: Counter[Shape] = Counter()
    for shape, times in zip(shapes, often if often is not None else [1] * len(shapes), strict=True):
        counts[rounded(shape, multiple)] += int(times)
    lengths = np.array([(sum(length for length, _ in s.prefixes), s.response) for s in counts])
    prompts, answers = (_some(column) for column in lengths.T)
    place = np.searchsorted(prompts, lengths[:, 0]), np.searchsorted(answers, lengths[:, 1])
    records = np.zeros((len(prompts), len(answers)))
    np.add.at(records, place, list(counts.values()))
    rungs = _rungs(records, prompts[:, None] + responses * answers, steps, least)
    held = [[s for s, p, r in zip(counts, *place, strict=True) if p <= a and r <= b] for a, b in rungs]
    unions = {reduce(Shape.union, each) for each in held}
    return tuple(sorted(unions, key=lambda s: (sum(n for n, _ in s.prefixes) + responses * s.response, s)))


def _some(lengths: np.ndarray) -> np.ndarray:
    """The different ones, or LENGTHS of them with the longest, rising."""
    different = np.unique(lengths)
    parts = np.linspace(0, len(different), min(len(different), LENGTHS) + 1)[1:]
    return different[np.ceil(parts).astype(int) - 1]


def _rungs(records: np.ndarray, tokens: np.ndarray, steps: int, least: int) -> list[tuple[int, int]]:
    """Rungs as places (a, b) of the table; the first is its last place.

    records [A, B]: how many have a length of the prompt and one of the responses. tokens [A, B]: what a
    record takes on a rung of that place, which holds all places up to it.
    """

    def paid(rungs: Sequence[tuple[int, int]]) -> np.ndarray:
        """[A, B]: what a record takes on the cheapest of these rungs."""
        out = np.full(tokens.shape, np.inf)
        for a, b in rungs:
            held = out[: a + 1, : b + 1]
            np.minimum(held, tokens[a, b], out=held)
        return out

    def best(rungs: Sequence[tuple[int, int]]) -> tuple[float, tuple[int, int]]:
        """(tokens that one more rung saves, its place)."""
        now, saved = paid(rungs), np.zeros(tokens.shape)
        for b in range(tokens.shape[1]):
            here = records[:, : b + 1]
            less = np.maximum(now[:, : b + 1] - tokens[:, b, None, None], 0)  # [rung, A, up to b]
            takes, gain = (np.tril((here * x).sum(-1)).sum(-1) for x in (less > 0, less))
            saved[:, b] = np.where(takes >= least, gain, 0)
        a, b = divmod(int(saved.argmax()), tokens.shape[1])
        return float(saved[a, b]), (a, b)

    rungs = [(tokens.shape[0] - 1, tokens.shape[1] - 1)]
    for _ in range(min(steps, int(records.sum()) // least) - 1):
        saved, place = best(rungs)
        if saved < WORTH * (paid(rungs) * records).sum():
            break
        rungs.append(place)
        for old in rungs[1:]:
            others = [each for each in rungs if each != old]
            saved, place = best(others)
            rungs = [*others, place] if saved else others
    return rungs
