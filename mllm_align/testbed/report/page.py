"""The quickstart's report: one self-contained HTML file, without scripts or network access."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from mllm_align.evaluation.intervals import Interval
from mllm_align.report import charts, page
from mllm_align.report.page import NOTHING, Cell, Curve, Marked, Row, Table, number, plain


@dataclass(frozen=True)
class Example:
    """A picture with its reference caption and responses; those that are None are omitted."""

    id: str
    png: bytes
    question: str
    truth: str
    rejected: Marked | None = None
    before: Marked | None = None
    control: Marked | None = None
    after: Marked | None = None


@dataclass(frozen=True)
class Report:
    """The contents of the page; empty parts are omitted together with their heading.

    verdict: plain sentences, the most important first.
    steps: the phases of the run, as (heading, text).
    results: the contents of results.json.
    pairs: training pairs (`truth` is the chosen response, with `rejected`).
    examples: pictures of the main split (`before`, `control`, `after`).
    """

    title: str
    verdict: Sequence[str] = ()
    steps: Sequence[tuple[str, str]] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    pairs: Sequence[Example] = ()
    examples: Sequence[Example] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Model(NamedTuple):
    key: str
    name: str
    detail: str


class Metric(NamedTuple):
    """How a metric is shown; `way`: -1 if lower is better, 1 if higher is better, 0 if neither; `chance`:
    what a guess gives, among yes and no, or among four arrangements."""

    name: str
    meaning: str
    way: int
    form: str
    chance: float = math.nan

    @property
    def spoken(self) -> str:
        """The name within a sentence; acronyms stay."""
        return self.name if self.name[:2].isupper() else self.name[:1].lower() + self.name[1:]

    def worse(self, value: Interval, first: Interval) -> bool:
        """Whether an interval lies wholly on the worse side of another."""
        return self.way * value.side(first) < 0

    def at_chance(self, value: Interval) -> bool:
        return value.low <= self.chance <= value.high


class Panel(NamedTuple):
    metric: Metric
    svg: str


MODELS = (
    Model("sft", "before", "SFT"),
    Model("sft_control", "control", "further SFT"),
    Model("aligned", "after", "aligned"),
)
SHARE = ".1%"
METRICS = {
    "chair_i": Metric("CHAIR_i", "of the things named, those that are not in the picture", -1, SHARE),
    "chair_s": Metric("CHAIR_s", "captions that name a thing that is not there", -1, SHARE),
    "recall": Metric("Recall", "of the things in the picture, those that are named", 1, SHARE),
    "pope_accuracy": Metric("POPE", "right answers to “is there a … in the picture?”", 1, SHARE, 0.5),
    "pope_random": Metric("POPE, random", "absent things asked for: any", 1, SHARE, 0.5),
    "pope_popular": Metric("POPE, popular", "absent things asked for: frequent ones", 1, SHARE, 0.5),
    "pope_adversarial": Metric(
        "POPE, adversarial", "absent things asked for: the expected ones", 1, SHARE, 0.5
    ),
    "attribute_error": Metric("Attribute errors", "wrong colours or sizes of things present", -1, SHARE),
    "place_error": Metric("Place errors", "wrong parts of the picture for things present", -1, SHARE),
    "relation_error": Metric("Relation errors", "wrong arrangements of things present", -1, SHARE, 0.75),
    "unparsed": Metric("Sentences not understood", "outside the grammar of the captions", -1, SHARE),
    "stutter": Metric("Doubled words", "sentences that say a word twice in a row", -1, SHARE),
    "words": Metric("Words", "in a caption", 0, ".1f"),
    "mentions": Metric("Mentions", "things named in a caption", 0, ".2f"),
    "expected_share": Metric("Expected errors", "of the wrong things, partners of a named one", 0, SHARE),
}
CHARTED = ("chair_i", "recall")
SPLITS = {
    "broken": "Bias-breaking split",
    "unbiased": "Unbiased split",
    "held_out": "Held-out split",
}


def render(report: Report) -> str:
    """Return the page; all texts are escaped."""
    results = report.results
    return page.render(
        "mllm_align.testbed.report",
        "page.html.jinja",
        report=report,
        caption=_caption(results),
        result=_table(results),
        panels=_panels(results),
        splits=_splits(results.get("other_splits") or {}),
        pairs=_pairs(results.get("pairs") or {}),
        curves=page.drawn(report.curves),
        seconds=_seconds(results.get("seconds") or {}),
        whole=_whole(results.get("seconds") or {}),
        settings=page.groups(report.settings),
    )


def write(report: Report, out: Path) -> None:
    """Write the page to `out` atomically; raises InputError if it can't be written."""
    page.write(render(report), out)


def _caption(results: Mapping[str, Any]) -> str:
    split, seeds = str(results.get("split") or ""), results.get("seeds")
    parts = [SPLITS.get(split, split), results.get("interval") and f"intervals: {results['interval']}"]
    if seeds:
        parts.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {plain(seeds)}")
    return "; ".join(part for part in parts if part)


def _metric(key: str) -> Metric:
    return METRICS.get(key) or Metric(key.replace("_", " "), "", 0, ".4g")


def _value(models: Mapping[str, Any], model: str, metric: str) -> Interval:
    return Interval.from_json((models.get(model) or {}).get(metric))


def _table(models: Mapping[str, Any]) -> Table | None:
    """Return a row per metric and a column per model; None if there are none."""
    there = [model for model in MODELS if models.get(model.key)]
    given = dict.fromkeys(metric for model in there for metric in models[model.key])
    ordered = [key for key in METRICS if key in given] + [key for key in given if key not in METRICS]
    rows = [_row(_metric(key), [_value(models, model.key, key) for model in there]) for key in ordered]
    return Table(there, rows) if rows else None


def _row(metric: Metric, values: Sequence[Interval]) -> Row:
    counts = dict.fromkeys(f"{value.n:,}" if value.n else NOTHING for value in values)
    return Row(metric, [_cell(metric, value, values[0]) for value in values], " / ".join(counts))


def _cell(metric: Metric, value: Interval, first: Interval) -> Cell:
    mean, low, high = (number(v, metric.form) for v in (value.mean, value.low, value.high))
    reach = f"[{low.rstrip('%')}, {high.rstrip('%')}]" if value.bounded else ""
    return Cell(mean, reach, _notes(metric, value, first))


def _notes(metric: Metric, value: Interval, first: Interval) -> list[str]:
    """Return whether the interval is entirely better or worse than the first model's, and at chance."""
    notes = {"better": metric.worse(first, value), "worse": metric.worse(value, first)}
    return [note for note, true in (notes | {"at chance": metric.at_chance(value)}).items() if true]


def _panels(results: Mapping[str, Any]) -> list[Panel]:
    """Return the charts of the main metrics, all on one scale."""
    dots = {key: _dots(results, key) for key in CHARTED}
    dots = {key: found for key, found in dots.items() if found}
    ranges = charts.spans(list(dots.values()))
    return [
        Panel(_metric(key), charts.intervals(found, low, high, _spoken(_metric(key).name, found)))
        for (key, found), (low, high) in zip(dots.items(), ranges, strict=True)
    ]


def _dots(results: Mapping[str, Any], key: str) -> list[charts.Dot]:
    found = [(model, _value(results, model.key, key)) for model in MODELS]
    return [
        charts.Dot(model.name, model.key, 100 * value.mean, 100 * value.low, 100 * value.high)
        for model, value in found
        if math.isfinite(value.mean)
    ]


def _spoken(name: str, dots: Sequence[charts.Dot]) -> str:
    return f"{name}: " + ", ".join(f"{dot.name} {dot.mean:.1f}%" for dot in dots)


def _splits(splits: Mapping[str, Any]) -> list[tuple[str, Table]]:
    tables = [(SPLITS.get(name, name), _table(models or {})) for name, models in splits.items()]
    return [(name, table) for name, table in tables if table]


def _pairs(pairs: Mapping[str, Any]) -> list[str]:
    """Return sentences: how many pairs there are, and how many of them differ, for each mask rate."""
    sentences = [f"{pairs['count']:,} pairs."] if pairs.get("count") else []
    for rate, shares in (pairs.get("differ_after_iteration") or {}).items():
        after = [f"{number(_float(share), SHARE)} after {i}" for i, share in enumerate(shares, 1)]
        if after:
            told = f"With {_percent(rate)} of the picture masked, the two responses of a pair differ enough"
            sentences.append(f"{told} in this share of the pairs, by iteration: {', '.join(after)}.")
    return sentences


def _percent(rate: str) -> str:
    try:
        return f"{100 * float(rate):g}%"
    except ValueError:
        return rate


def _seconds(seconds: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return phase, time and length of its bar in percent."""
    times = {name.replace("_", " "): _float(value) for name, value in seconds.items()}
    longest = max((time for time in times.values() if math.isfinite(time)), default=0) or 1
    bars = {name: 100 * time / longest if math.isfinite(time) else 0 for name, time in times.items()}
    return [(name, number(time, ",.1f", " s"), bars[name]) for name, time in times.items()]


def _whole(seconds: Mapping[str, Any]) -> str:
    """Return the sum of all phases."""
    minutes, rest = divmod(round(sum(filter(math.isfinite, map(_float, seconds.values())))), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _float(value: Any) -> float:
    return float(value) if isinstance(value, Real) else math.nan
