"""Few sizes: every padded shape compiles a program, so lengths are rounded up to one of a few."""

from __future__ import annotations

from collections.abc import Sequence

from mllm_align.batch import Shape


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


def ladder(shapes: Sequence[Shape], responses: int, steps: int, multiple: int) -> tuple[Shape, ...]:
    """At most `steps` padded shapes, each holding the one before; the last holds every record.

    Records are ranked by their number of tokens and cut into equal parts; a rung is the union of all
    shapes up to its part. So a run compiles a handful of programs and short records pad little.
    """
    ranked = sorted(
        (rounded(s, multiple) for s in shapes),
        key=lambda s: sum(length for length, _ in s.prefixes) + responses * s.response,
    )
    rungs: list[Shape] = []
    rung = ranked[0]
    for i, shape in enumerate(ranked):
        rung = rung.union(shape)
        if (i + 1) * steps // len(ranked) > i * steps // len(ranked) and (not rungs or rungs[-1] != rung):
            rungs.append(rung)
    return tuple(rungs)
