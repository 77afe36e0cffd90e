"""Examples for the page of an evaluation: the most changed answers, or one model's worst."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mllm_align.evaluation.base import Evaluator, hidden
from mllm_align.evaluation.compare import by_record, evaluator_of
from mllm_align.evaluation.results import Evaluation
from mllm_align.report import page
from mllm_align.report.page import Marked, plain

EXAMPLES = 6  # of each benchmark
LABELS = ("label", "answer", "answers", "objects", "reference", "gt_answer")  # what lines may have them as
VERDICT = 400  # characters of a judge's text

Results = Mapping[str, Mapping[str, Evaluation]]  # model -> benchmark -> evaluation
Lines = Mapping[str, Sequence[Mapping[str, Any]]]  # id of a record -> its lines


class Said(NamedTuple):
    """What a model said of a record. note: better or worse than the first model's, or empty."""

    model: str
    text: Marked
    judge: str
    note: str


class Card(NamedTuple):
    id: str
    picture: dict[str, Any] | None
    question: str
    labels: str
    said: list[Said]


class Part(NamedTuple):
    """One benchmark's examples. counts: sentences."""

    benchmark: str
    counts: list[str]
    cards: list[Card]


def part_of(results: Results, name: str) -> Part | None:
    """The examples of a benchmark; None if there are none."""
    there = {model: by_record(own[name]) for model, own in results.items() if name in own}
    evaluator = evaluator_of(next(own[name] for own in results.values() if name in own))
    first, *others = there
    scores = {model: {id: _scores(evaluator, own[id]) for id in own} for model, own in there.items()}
    changes: dict[str, dict[str, float]] = {
        other: {
            id: _change(evaluator, scores[first][id], own)
            for id, own in scores[other].items()
            if id in scores[first]
        }
        for other in others
    }
    if others:
        chosen = _most_changed(there[first], changes)
        counts = [_counted(other, first, list(own.values())) for other, own in changes.items()]
    else:
        values = {id: _change(evaluator, {}, own, alone=True) for id, own in scores[first].items()}
        chosen = _worst(there[first], values)
        counts = []
    cards = [_card(evaluator, there, changes, id) for id in chosen]
    return Part(name, counts, cards) if cards else None


def _scores(evaluator: type[Evaluator], lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The record's own figures, over the runs of a judge; those that tell better from worse."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, (total, weight) in line["figures"].items():
            if weight > 0 and evaluator.way(name):
                found.setdefault(name, []).append(total / weight)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _change(
    evaluator: type[Evaluator],
    before: Mapping[str, float],
    after: Mapping[str, float],
    alone: bool = False,
) -> float:
    """How much better a record's figures are, added up over those that both have."""
    names = after if alone else [name for name in after if name in before]
    return sum(evaluator.way(name) * (after[name] - before.get(name, 0.0)) for name in names)


def _counted(other: str, first: str, changes: Sequence[float]) -> str:
    better, worse = sum(each > 0 for each in changes), sum(each < 0 for each in changes)
    same = len(changes) - better - worse
    return f"{other}: {better:,} better, {worse:,} worse, {same:,} scored as {first}’s."


def _most_changed(lines: Lines, changes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Ids of records: about as many that got better as got worse, in turn, the largest changes first."""
    largest: dict[str, float] = {}
    for own in changes.values():
        for id, change in own.items():
            if abs(change) > abs(largest.get(id, 0.0)):
                largest[id] = change
    better = _one_of_each_picture(
        lines, sorted((i for i in largest if largest[i] > 0), key=lambda i: -largest[i])
    )
    worse = _one_of_each_picture(
        lines, sorted((i for i in largest if largest[i] < 0), key=lambda i: largest[i])
    )
    few = min(len(better), len(worse), EXAMPLES // 2)
    more = EXAMPLES - few
    kept = (better[:more], worse[:few]) if len(better) >= len(worse) else (better[:few], worse[:more])
    return [*kept[0], *kept[1]]


def _worst(lines: Lines, values: Mapping[str, float]) -> list[str]:
    """Ids of records, the least figures first, without those that no record is better than."""
    best = max(values.values(), default=0.0)
    below = sorted((id for id, value in values.items() if value < best), key=lambda id: values[id])
    return _one_of_each_picture(lines, below)[:EXAMPLES]


def _one_of_each_picture(lines: Lines, ids: Sequence[str]) -> list[str]:
    """The first record of every picture; records without one stay."""
    seen: dict[str, str] = {}
    for id in ids:
        seen.setdefault(",".join(lines[id][0]["record"]["images"]) or id, id)
    return list(seen.values())


def _card(
    evaluator: type[Evaluator],
    there: Mapping[str, Lines],
    changes: Mapping[str, Mapping[str, float]],
    id: str,
) -> Card:
    line = next(iter(there.values()))[id][0]
    record, field = line["record"], evaluator.fields[1]
    labels = next((line[key] for key in LABELS if key != field and line.get(key)), None)
    if isinstance(labels, list):
        labels = list(dict.fromkeys(map(str, labels)))
    said = []
    for model, own in there.items():
        if id in own:
            change = changes.get(model, {}).get(id, 0.0)
            note = "better" if change > 0 else "worse" if change < 0 else ""
            said.append(_said(model, field, own[id][0], note))
    picture = next((page.thumbnail(file) for file in record["images"]), None)
    return Card(id, picture, record["question"], plain(labels) if labels else "", said)


def _said(model: str, field: str, line: Mapping[str, Any], note: str) -> Said:
    text, judge = line.get(field), line.get("content")
    if not isinstance(text, str):
        text = (
            ""
            if isinstance(judge, str)
            else ", ".join(
                f"{n} {s / w:.4g}" for n, (s, w) in line["figures"].items() if w and not hidden(n)
            )
        )
    judge = judge if isinstance(judge, str) else ""
    judge = judge if len(judge) <= VERDICT else judge[:VERDICT] + "…"
    words = line.get("hallucinated_words")
    return Said(
        model, Marked(text, tuple(_places(text, words if isinstance(words, list) else []))), judge, note
    )


def _places(text: str, words: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Where these words stand in a text, in any case."""
    for word in words:
        pattern = r"\s+".join(map(re.escape, str(word).split()))
        if pattern:
            yield from (
                each.span() for each in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
            )
