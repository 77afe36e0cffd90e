"""Verdicts that exist are scored: files of them, joined with a benchmark's questions by their names.

Neither a model nor a judge is needed, and JAX does not start.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.config import DataConfig, to_json
from mllm_align.errors import InputError, first_few, one_line, quoted, refusal
from mllm_align.evaluation.answers import fingerprint_of, refuse, same_question
from mllm_align.evaluation.base import (
    EvaluationConfig,
    Evaluator,
    Item,
    Scored,
    check_items,
    check_scored,
    figures,
    open_evaluator,
)
from mllm_align.evaluation.judged import Judged
from mllm_align.evaluation.results import (
    REVIEWS,
    Evaluation,
    about,
    check_folder,
    guarded,
    read_finished,
    record_of,
    results_of,
    write,
)
from mllm_align.files import parse_json
from mllm_align.training.run_facts import versions

Run = tuple[str, list[dict[str, Any]]]  # where it was read, and its verdicts


def score_reviews(
    reviews: Sequence[str | Path],
    data: Any,
    evaluator: Evaluator | str,
    *,
    out: str | Path | None = None,
    config: DataConfig | None = None,
) -> Evaluation:
    """Score files of verdicts, each of one run of the judge or of several, in the benchmark's own names of
    fields.

    data, evaluator, config: as `evaluate` takes them. out: a folder to write. Figures are the means over
    the runs; of several, `scores` also has the headline figure of each, `runs`, and its standard deviation,
    `std`. `unparsable` counts the verdicts that can't be read. Raises InputError for verdicts that don't
    join with the data: on other questions, doubled, missing.
    """
    began, files = time.time(), [Path(each) for each in reviews]
    opened = open_evaluator(evaluator)
    settings = EvaluationConfig(opened, data=config or DataConfig())
    if not isinstance(opened, Judged):
        raise InputError(f"evaluator {type(opened).__name__} takes no verdicts; give --answers or --model")
    if not files:
        raise InputError("there are no files of verdicts; give at least one with --reviews")
    if out is not None:
        check_folder(Path(out))
    runs = [run for file in files for run in _runs(opened, file)]
    first = runs[0][1]
    items = guarded(opened, lambda: check_items(opened, opened.reviewed(data, settings.data, first)))
    joined = [join(opened, items, rows, where) for where, rows in runs]
    stamp = about(settings, to_json(opened)) | {
        "reviews_fingerprint": [sha256(file.read_bytes()).hexdigest()[:16] for file in files],
        "data_fingerprint": fingerprint_of(items),
    }
    done = None if out is None else read_finished(Path(out), stamp, REVIEWS)
    if done is not None:
        return done
    source = str(data) if isinstance(data, str | Path) else None
    more: dict[str, Any] = {"data": source, "reviews": [str(file) for file in files]}
    runs = [(where, rows) for (where, _), rows in zip(runs, joined, strict=True)]
    found = figures_of(opened, items, runs, stamp, began, prompt=None, **more)
    if out is not None:
        write(Path(out), *found, REVIEWS)
    return found


def figures_of(
    evaluator: Judged,
    items: Sequence[Item],
    runs: Sequence[Run],
    stamp: Mapping[str, Any],
    began: float,
    remedy: str = "give this benchmark's verdicts",
    **more: Any,
) -> Evaluation:
    """The figures that follow from runs of verdicts, each in the order of the items, and a line for each
    verdict. stamp: what they follow from. began: time of the start. remedy: where none can be read. more:
    further fields of the results."""
    scored = [_scored(evaluator, items, rows, where, remedy) for where, rows in runs]
    lines = [
        {"index": index, "run": run, **row, **each.details, "figures": each.sums()}
        | {"record": record_of(evaluator, item)}
        for run, ((_, rows), of_run) in enumerate(zip(runs, scored, strict=True), 1)
        for index, (item, row, each) in enumerate(zip(items, rows, of_run, strict=True))
    ]
    more |= {"unparsable": sum("unparsable" in line for line in lines), "versions": versions()}
    more["seconds"] = round(time.time() - began, 3)
    results = results_of(evaluator, items, scored[0], stamp, again=scored[1:], **more)
    results["scores"].setdefault(evaluator.groups, {})
    if len(runs) > 1:
        each = [figures(evaluator, items, run)[evaluator.headline].mean for run in scored]
        results["scores"] |= {"runs": each, "std": float(np.std(each))}
    return Evaluation(results, lines)


def join(
    evaluator: Judged, items: Sequence[Item], rows: Sequence[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """The verdicts of one run in the order of the items.

    Raises InputError, with a count and names, for verdicts on no item or on another question, doubled ones,
    and items without one.
    """
    keys = []
    for number, row in enumerate(rows, 1):
        at = f"{where} verdict {number}"
        try:
            keys.append(evaluator.review_key(row))
        except (KeyError, ValueError) as error:
            problem = f"says nothing of its question ({one_line(error)})"
            raise refusal(at, problem, "give its id") from error
        text = row.get("content")
        if not isinstance(text, str):
            kind = "is missing" if text is None else f"is a {type(text).__name__}"
            raise refusal(f"{at}, content", kind, "give the judge's text")
    known, found = {item.record.id: item for item in items}, dict(zip(keys, rows, strict=True))
    others = [key for key, row in found.items() if key in known and not _same(known[key], row)]
    faults = [
        ([k for k, n in Counter(keys).items() if n > 1], "ids come several times", "keep one of each"),
        ([k for k in found if k not in known], "verdicts are on no question of the data", "leave them out"),
        (others, "verdicts are on other questions of the same ids", "give those on these questions"),
        ([k for k in known if k not in found], f"of {len(known)} questions have no verdict", "add them"),
    ]
    refuse(where, faults)
    return [found[key] for key in known]


def _same(item: Item, row: dict[str, Any]) -> bool:
    """Whether question, image and category are the item's, where both have them."""
    wanted, named = item.labels.get("category"), row.get("category")
    return same_question(item, row) and (wanted is None or named is None or named == wanted)


def _scored(
    evaluator: Judged, items: Sequence[Item], rows: Sequence[dict[str, Any]], where: str, remedy: str
) -> list[Scored]:
    """Raises InputError where none of a run's verdicts can be read."""
    texts = [row["content"] for row in rows]
    found = guarded(evaluator, lambda: list(evaluator.verdicts(items, texts)))
    check_scored(evaluator, found, items)
    if all("unparsable" in each.details for each in found):
        sample = quoted(rows[0]["content"])
        problem = f"none of {len(rows)} verdicts can be read, the first being {sample}"
        raise refusal(where, problem, remedy)
    return found


def _runs(evaluator: Judged, file: Path) -> list[Run]:
    """The runs of the judge that a file has."""
    value = _value(file)
    rows = guarded(evaluator, lambda: evaluator.reviews(value))
    for number, row in enumerate(rows, 1):
        at = f"{file} verdict {number}"
        if not isinstance(row, dict):
            raise refusal(at, f"is {quoted(row)}", "give an object with fields")
        if type(row.get("run", 1)) is not int:
            raise refusal(f"{at}, run", f"is {quoted(row['run'])}", "give its number, or leave it out")
    if not rows:
        raise refusal(str(file), "has no verdicts", "give at least one")

    def number_of(row: dict[str, Any]) -> int:
        return row.get("run", 1)

    found = [(run, [*each]) for run, each in groupby(sorted(rows, key=number_of), number_of)]
    return [(f"{file} run {run}" if len(found) > 1 else str(file), each) for run, each in found]


def _value(file: Path) -> Any:
    """The JSON value of a file, or the list of its lines."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise refusal(str(file), f"can't be read ({error.strerror})", "give a file of verdicts") from error
    try:
        return _parsed(text, str(file))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(_parsed(line, f"{file} line {number}"))
            except InputError:
                raise
            except ValueError as error:
                problem = f"is not JSON ({one_line(error, 200)})"
                raise refusal(f"{file} line {number}", problem, "correct it") from error
    return rows


def _parsed(text: bytes, where: str) -> Any:
    """Raises InputError for an object that has a name twice, of which JSON keeps one without a word."""

    def only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        doubled = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if doubled:
            problem = f"{len(doubled)} names come several times: {first_few(doubled)}"
            raise refusal(where, problem, "keep one of each")
        return dict(pairs)

    parse_json(text)
    return json.loads(text, object_pairs_hook=only_once)
