"""Batches as a pure function of (seed, step).

Which records batch t holds, their order and the padded shape follow from the seed, t and the table of
lengths alone: the same on every process, and after every restart. The position of a run is one integer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import numpy as np

from mllm_align.batch import Group, PromptGroup, Shape, pad, padded, stack, with_responses
from mllm_align.data.encode import Draw, Encoded, Encoder
from mllm_align.data.mixture import Draws
from mllm_align.data.segments import changed_tokens
from mllm_align.sizes import ladder

BATCHES = 2  # of an epoch, at least, for each shape that compiles


@dataclass(frozen=True)
class HostBatch:
    """A batch on the host: leaves of `group` are numpy with a leading axis of micro-batches.

    group: of every micro-batch the rows that this process holds. records: indices into the data, in the
    order of the rows of the whole batch; rows after them only fill it. shape: what all are padded to.
    """

    step: int
    group: PromptGroup
    records: tuple[int, ...]
    shape: Shape


class Batches:
    """All batches of a data set.

    size: rows of a batch. micro: parts it is split into. local_rows: rows of each part that this process
    makes, default all. With `shuffle`, every epoch has an order of its own and records of one rung of the
    ladder share batches; without, batches follow the file. What is left over at the end of an epoch fills
    a last batch whose missing rows have weight 0. shapes: of padded batches, at most; one for every
    `BATCHES` of an epoch. weights: of the sets that the records are of, for a
    mixture; then an epoch has of each set its share (see `mixture.py`). features: number of a
    record -> the tower's [t, I, F] for each prefix; without it images are read. borrowed: how many
    responses of the batch's next record follow a record's own (after the last comes the first). reference:
    log-probs of each view, of each record those of its responses. references: likewise of each further
    reference, of the first view. redraw: crops and noise differ from epoch
    to epoch. changed: with the tokens in which the two responses of a pair differ.
    """

    def __init__(
        self,
        records: Sequence[Encoded],
        encoder: Encoder,
        *,
        size: int,
        micro: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        shapes: int = 8,
        multiple: int = 32,
        reference: Sequence[Sequence[Sequence[np.ndarray]]] | None = None,
        references: Sequence[Sequence[Sequence[np.ndarray]]] = (),
        local_rows: Sequence[int] | None = None,
        weights: Mapping[str, float] | None = None,
        features: Callable[[int], Sequence[np.ndarray]] | None = None,
        borrowed: int = 0,
        redraw: bool = True,
        changed: bool = False,
    ):
        self.records = records
        self.encoder = encoder
        self.size, self.micro, self.seed, self.shuffle = size, micro, seed, shuffle
        self.reference, self.features, self.borrowed = reference, features, borrowed
        self.redraw, self.changed, self.references = redraw, changed, references
        self.local_rows = range(size // micro) if local_rows is None else local_rows
        self.per_epoch = -(-len(records) // size)
        self._parts = [tuple(range(i, min(i + size, len(records)))) for i in range(0, len(records), size)]
        self._draws, self._sources = None, None
        if weights is not None:
            sources, names = [each.record.source for each in records], list(weights)
            self._draws = Draws(sources, weights, seed)
            self._sources = np.array([names.index(each) for each in sources], np.int32)
        needs, least, often = [r.shape for r in records], BATCHES * size, None
        if not shuffle:  # the batches are known: fit the ladder to them
            needs, least = [reduce(Shape.union, (needs[r] for r in part)) for part in self._parts], BATCHES
        elif self._draws is not None:
            often = np.bincount(self._draws(0), minlength=len(records)).tolist()
        count = sum(len(part.responses) for part in records[0].parts) + borrowed
        self.ladder = ladder(needs, count, shapes, multiple, least, often)
        level = {need: self._first(need) for need in set(needs)}
        self.levels = [level[need] for need in needs]
        self._epoch = lru_cache(maxsize=2)(self._plan)

    def _first(self, need: Shape, start: int = 0) -> int:
        """The first rung that holds a shape, of those from `start` on."""
        return next(i for i in range(start, len(self.ladder)) if self.ladder[i].holds(need))

    def _plan(self, epoch: int) -> list[tuple[int, tuple[int, ...]]]:
        """(level, record indices) of each batch of an epoch."""
        count, size = len(self.records), self.size
        if not self.shuffle:
            return list(zip(self.levels, self._parts, strict=True))
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(count if self._draws is None else self._draws(epoch))
        batches: list[tuple[int, tuple[int, ...]]] = []
        waiting: list[list[int]] = [[] for _ in self.ladder]
        for record in order.tolist():
            waiting[self.levels[record]].append(record)
        for level, rung in enumerate(self.ladder):
            here, last = waiting[level], level + 1 == len(self.ladder)
            full = len(here) if last else len(here) // size * size
            batches += [(level, tuple(here[i : min(i + size, full)])) for i in range(0, full, size)]
            if not last:  # the rest joins the next rung that holds this one
                waiting[self._first(rung, level + 1)] += here[full:]
        return [batches[i] for i in rng.permutation(len(batches))]

    def plan(self, step: int) -> tuple[Shape, tuple[int, ...]]:
        """Padded shape and record indices of a batch."""
        level, records = self._epoch(step // self.per_epoch)[step % self.per_epoch]
        return self.ladder[level], records

    def digest(self, step: int) -> str:
        """Names the records of the first `step` batches and their order."""
        ids = hashlib.sha256()
        for earlier in range(step):
            ids.update(
                np.array([self.records[r].index for r in self.plan(earlier)[1]], "<i8").tobytes() + b"|"
            )
        return ids.hexdigest()[:16]

    def __call__(self, step: int) -> HostBatch:
        """Batch number `step`, counted from 0 over all epochs: images read, padded, stacked."""
        shape, records = self.plan(step)
        parts = []
        for start in range(0, self.size, self.size // self.micro):
            places = [start + row for row in self.local_rows if start + row < len(records)]
            here = [records[place] for place in places]
            # a part without a record repeats one with weight 0
            draw = self.seed, step // self.per_epoch if self.redraw else 0
            groups = [self._group(records, place, draw) for place in places or (0,)]
            part = pad(groups, shape, len(self.local_rows))
            if not here:
                part = with_responses(part, weight=np.zeros_like(part.responses.weight))
            if self.changed:
                part = with_responses(
                    part, changed=changed_tokens(part.responses.tokens, part.responses.mask)
                )
            if self.reference is not None:
                views = zip(self.reference, part.views, strict=True)
                stored = tuple(_stored(each, here, part, len(view)) for each, view in views)
                part = with_responses(part, reference=stored)
            if self.references:
                count = len(part.views[0])
                stored = [_stored(each, here, part, count) for each in self.references]
                part = with_responses(part, references=np.stack(stored, 1))
            if self._sources is not None:
                own = padded(self._sources[here], len(self.local_rows))
                part = replace(part, source=own)  # type: ignore[arg-type]
            parts.append(part)
        return HostBatch(step, stack(parts), records, shape)

    def _group(self, records: Sequence[int], place: int, draw: Draw) -> Group:
        record = records[place]
        features = None if self.features is None else self.features(record)
        group = self.encoder.group(self.records[record], features, draw)
        if not self.borrowed:
            return group
        following = self.records[records[(place + 1) % len(records)]].responses[: self.borrowed]
        if len(records) == 1:  # its own are no other record's
            following = (np.zeros(0, np.int32),) * self.borrowed
        return Group(group.prefixes, (*group.responses, *following))

    def iterate(self, steps: Sequence[int], threads: int, prefetch: int) -> Iterator[HostBatch]:
        """These batches in order, made ahead of time by `threads`."""
        import grain  # here alone: batches can be made one by one without it

        # more threads than batches ahead would idle
        options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
        numbers = grain.MapDataset.range(len(steps))
        return iter(numbers.map(lambda i: self(steps[i])).to_iter_dataset(options))


def _stored(
    logps: Sequence[Sequence[np.ndarray]], records: Sequence[int], part: PromptGroup, count: int
) -> np.ndarray:
    """[B, count, R]: log-probs of these records' responses, 0 at padding."""
    size, _, length = part.responses.tokens.shape
    out = np.zeros((size, count, length), np.float32)
    for row, record in enumerate(records):
        for k, values in enumerate(logps[record]):
            out[row, k, : len(values)] = values
    return out
