"""The page of an evaluation: figures by benchmark and model, their differences, examples of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mllm_align.errors import InputError
from mllm_align.evaluation.compare import (
    Comparison,
    Difference,
    compare,
    evaluator_of,
    flat_intervals,
    form_of,
    headlines,
    read_evaluation,
    title_of,
)
from mllm_align.evaluation.examples import part_of
from mllm_align.evaluation.intervals import Interval
from mllm_align.evaluation.results import Evaluation
from mllm_align.files import names_apart
from mllm_align.report import page
from mllm_align.report.page import NOTHING, Cell, Row, Table, plain

PAGE = "report.html"
HARD = "\u00a0"  # a space that no line ends at
Results = Mapping[str, Mapping[str, Evaluation]]  # model -> benchmark -> evaluation


class Metric(NamedTuple):
    name: str
    meaning: str
    way: int


class Model(NamedTuple):
    key: str
    name: str
    detail: str


def write_page(results: Results, out: str | Path) -> list[str]:
    """Draw evaluations by model and benchmark as one HTML file; the sentences that compare every model with
    the first. Raises InputError where the page can't be written."""
    found = {
        model: {name: each for name, each in own.items() if each.results["scores"]}
        for model, own in results.items()
    }
    benchmarks = list(dict.fromkeys(name for own in found.values() for name in own))
    first, *others = found
    compared: dict[tuple[str, str], Comparison] = {}
    untold: list[str] = []
    for name in benchmarks:
        for other in others:
            if name in found[first] and name in found[other]:
                try:
                    compared[other, name] = compare(found[first][name], found[other][name], (first, other))
                except InputError as error:
                    untold.append(f"{name}: {error}.")
    sentences = [each.sentence for each in compared.values()] + untold
    text = page.render(
        "mllm_align.evaluation",
        "page.html.jinja",
        report={"title": _title(list(found), benchmarks), "verdict": _summary(found, benchmarks, compared)},
        several=bool(others),
        result=_table(found, benchmarks, compared, headlines),
        sentences=sentences,
        tables=_tables(found, benchmarks, compared),
        parts=[part for name in benchmarks if (part := part_of(found, name))],
        settings=_settings(found),
    )
    page.write(text, Path(out))
    return sentences


def page_of_folders(folders: Sequence[str | Path], out: str | Path) -> list[str]:
    """The same of the folders that evaluations left: several of one benchmark are of several models, which
    are named after their folders. Raises InputError for folders that are none."""
    evaluations = [read_evaluation(folder) for folder in folders]
    titles = [title_of(each.results["benchmark"]) for each in evaluations]
    places = [
        path.parent if path.name == title else path
        for path, title in zip((Path(each).absolute() for each in folders), titles, strict=True)
    ]
    several = list(dict.fromkeys(places))
    names = dict(zip(several, names_apart(several), strict=True))
    found: dict[str, dict[str, Evaluation]] = {}
    for evaluation, title, place in zip(evaluations, titles, places, strict=True):
        if found.setdefault(names[place], {}).setdefault(title, evaluation) is not evaluation:
            raise InputError(f"{place} is given twice; give each once")
    return write_page(found, out)


# ---- figures -----------------------------------------------------------------------------------------


def _title(models: Sequence[str], benchmarks: Sequence[str]) -> str:
    if len(models) == 1:
        return f"{models[0]} on {benchmarks[0]}" if len(benchmarks) == 1 else models[0]
    return ", ".join(models[1:]) + f" against {models[0]}"


def _summary(
    found: Results, benchmarks: Sequence[str], compared: Mapping[tuple[str, str], Comparison]
) -> list[str]:
    """What came of it, in a sentence for each model."""
    first, *others = found
    if not others:
        told = []
        for name in benchmarks:
            every = flat_intervals(found[first][name].results["intervals"])
            figures = [f"{_words(each)} {_with_ends(every[each])}" for each in headlines(every)]
            told.append(f"{name}: {', '.join(figures)}.")
        return told[:4]
    sentences = []
    for other in others:
        outcomes: dict[str, list[str]] = {}
        for name in benchmarks:
            if (other, name) in compared:
                sides = {each.verdict for each in compared[other, name].headlines.values()} - {0}
                kinds = {1: "better on", -1: "worse on"}
                outcome = (
                    "better and worse on" if len(sides) > 1 else kinds.get(sum(sides), "can’t be told on")
                )
                outcomes.setdefault(outcome, []).append(name)
        if outcomes:
            order = ("better on", "better and worse on", "worse on", "can’t be told on")
            told = [f"{each} {', '.join(outcomes[each])}" for each in order if each in outcomes]
            sentences.append(f"{other} against {first}: {'; '.join(told)}.")
    return sentences


def _words(name: str) -> str:
    return name.replace("/", " ")


def _with_ends(each: Interval) -> str:
    form = form_of(each.mean)
    ends = f" ({each.low:{form}} to {each.high:{form}})" if each.bounded else ""
    return f"{each.mean:{form}}{ends}"


def _table(
    found: Results,
    benchmarks: Sequence[str],
    compared: Mapping[tuple[str, str], Comparison],
    chosen: Any = list,
    named: bool = True,
) -> Table:
    """chosen: which of a benchmark's figures are rows. named: rows say which benchmark they are of."""
    first, *others = found
    models = [Model("", first, "compared with" if others else "")] + [
        Model("", each, "") for each in others
    ]
    rows = []
    for name in benchmarks:
        values = {
            m: flat_intervals(own[name].results["intervals"]) for m, own in found.items() if name in own
        }
        evaluator = evaluator_of(next(own[name] for own in found.values() if name in own))
        for figure in chosen(dict.fromkeys(each for own in values.values() for each in own)):
            cells, form = [], form_of(*(own[figure].mean for own in values.values() if figure in own))
            for model in found:
                difference = (
                    compared[model, name].differences.get(figure) if (model, name) in compared else None
                )
                cells.append(_cell(values.get(model, {}).get(figure), difference, form))
            counts = dict.fromkeys(f"{own[figure].n:,}" for own in values.values() if figure in own)
            title = f"{name}: {_words(figure)}" if named else _words(figure)
            rows.append(Row(Metric(title, "", evaluator.way(figure)), cells, " / ".join(counts)))
    return Table(models, rows)


def _cell(value: Interval | None, difference: Difference | None, form: str) -> Cell:
    if value is None:
        return Cell(NOTHING, "", [])
    reach = f"[{value.low:{form}},{HARD}{value.high:{form}}]" if value.bounded else ""
    if difference is None:
        return Cell(f"{value.mean:{form}}", reach, [])
    change = difference.interval
    ends = f" [{change.low:+{form}},{HARD}{change.high:+{form}}]" if change.bounded else ""
    note = {1: ["better"], -1: ["worse"]}.get(difference.verdict, [])
    return Cell(f"{value.mean:{form}}", reach, note, f"{change.mean:+{form}}{ends}")


def _tables(
    found: Results, benchmarks: Sequence[str], compared: Mapping[tuple[str, str], Comparison]
) -> list[tuple[str, Table]]:
    """All figures of the benchmarks that have more than their headlines."""
    tables = [(name, _table(found, [name], compared, named=False)) for name in benchmarks]
    return [(name, table) for name, table in tables if len(table.rows) > len(_heads_of(found, name))]


def _heads_of(found: Results, name: str) -> list[str]:
    return headlines(
        flat_intervals(next(o[name] for o in found.values() if name in o).results["intervals"])
    )


def _settings(found: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """What each evaluation follows from."""
    named = ("model", "fingerprint", "answers", "reviews", "data", "prompt", "n", "left_out", "unparsable")
    return [
        (
            f"{model}, {name}",
            [(key, plain(each.results[key])) for key in named if each.results.get(key) not in (None, 0)],
        )
        for model, own in found.items()
        for name, each in own.items()
    ]
