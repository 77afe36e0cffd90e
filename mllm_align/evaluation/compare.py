"""Two results of one benchmark: is the second model better, is it worse, or can't it be told?

Both models answered the same questions, so the bootstrap draws questions (their groups, such as images) and
looks at the difference of the figures in each draw: what makes a question hard for both cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm_align.errors import first_few, one_line, refusal
from mllm_align.evaluation.base import (
    EVALUATORS,
    Evaluator,
    Sums,
    added,
    derive,
    hidden,
    mean,
    names_of,
    table_of,
)
from mllm_align.evaluation.intervals import Interval, bootstrap
from mllm_align.evaluation.results import ANSWERS, RESULTS, REVIEWS, Evaluation
from mllm_align.files import parse_json, read_json

SAME = "compare answers to the same questions"
ROUNDING = 1e-9


class Difference(NamedTuple):
    """A figure of both models, and the interval of the second less the first. way: whether higher is better
    (1) or lower (-1), or neither (0)."""

    first: float
    second: float
    interval: Interval
    way: int

    @property
    def verdict(self) -> int:
        """1 where the second is better, -1 where it is worse, 0 where that can't be told."""
        least = ROUNDING * max(1.0, abs(self.first), abs(self.second))
        return self.way * ((self.interval.low > least) - (self.interval.high < -least))

    @property
    def words(self) -> str:
        """ "0.412 against 0.388, +0.024 (0.011 to 0.036)" """
        form = form_of(self.first, self.second)
        low, high = (f"{end:{form}}" for end in (self.interval.low, self.interval.high))
        reach = f" ({low} to {high})" if self.interval.bounded else ""
        return f"{self.second:{form}} against {self.first:{form}}, {self.interval.mean:+{form}}{reach}"


@dataclass(frozen=True)
class Comparison:
    """names: of the first and the second model. differences: by figure; those without a group tell most,
    and are `headlines`. records: how many both models have. alone: how many the first alone has, and the
    second alone; these are left out. settings: names of those in which the evaluations differ."""

    benchmark: str
    names: tuple[str, str]
    differences: Mapping[str, Difference]
    records: int
    alone: tuple[int, int] = (0, 0)
    settings: tuple[str, ...] = ()

    @property
    def headlines(self) -> dict[str, Difference]:
        return {name: self.differences[name] for name in headlines(self.differences)}

    @property
    def sentence(self) -> str:
        """The outcome in plain words, with the headline figures and the 95% intervals of their
        differences."""
        told: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for name, each in self.headlines.items():
            if each.way:
                told[each.verdict].append(f"{name} {each.words}")
        first, second = self.names
        parts = [
            f"{second} is {how} than {first} ({'; '.join(told[side])})"
            for side, how in ((1, "better"), (-1, "worse"))
            if told[side]
        ]
        if told[0] and not parts:
            untold = f"whether {second} is better than {first} can't be told"
            parts = [f"{untold} ({'; '.join(told[0])})"]
        elif told[0]:
            parts.append(f"can't be told: {'; '.join(told[0])}")
        notes = []
        if any(self.alone):
            notes = [f"{sum(self.alone)} records that one of them lacks are left out"]
        if self.settings:
            notes.append(f"Settings differ: {', '.join(self.settings)}")
        said = "; ".join(parts) or f"nothing that {first} and {second} could be compared by"
        return f"{title_of(self.benchmark)}: " + ". ".join([said, *notes]) + "."


def title_of(benchmark: str) -> str:
    """A benchmark's name; of a user's, that of its class."""
    return benchmark.rpartition(":")[2]


def form_of(*values: float) -> str:
    """How a figure is written: shares with three digits, ratings with two, percent with one."""
    largest = max((abs(each) for each in values if math.isfinite(each)), default=0.0)
    return ".3f" if largest <= 1 else ".2f" if largest <= 10 else ".1f"


def headlines(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The figures that tell most: those that are of no group; all where every one is."""
    return [name for name in names if "/" not in name] or list(names)


# ---- results that exist ------------------------------------------------------------------------------


def read_evaluation(folder: str | Path) -> Evaluation:
    """What an evaluation left in its folder. Lines are those of the answers, or of the verdicts with what
    their answers have beside. Raises InputError for another folder."""
    folder = Path(folder)
    remedy = "give the folder of an evaluation that is done"
    results = read_json(folder / RESULTS, remedy)
    if not isinstance(results.get("benchmark"), str) or not isinstance(results.get("intervals"), dict):
        raise refusal(str(folder / RESULTS), "has no figures of a benchmark", remedy)
    file = folder / (REVIEWS if (folder / REVIEWS).exists() else ANSWERS)
    lines = _lines(file, remedy)
    scored = [line for line in lines if "figures" in line]
    if not scored or not all(isinstance(line.get("record"), dict) for line in scored):
        raise refusal(str(file), "does not say what its records are", "evaluate again, into another folder")
    if file.name == REVIEWS and (folder / ANSWERS).exists():  # the answers that the verdicts are on
        answers = [line for line in _lines(folder / ANSWERS, remedy) if "record" in line]
        by_id = {line["record"]["id"]: line for line in answers}
        lines = [by_id.get(line["record"]["id"], {}) | line for line in scored]
    return Evaluation(results, lines)


def _lines(file: Path, remedy: str) -> list[dict[str, Any]]:
    try:
        lines = [parse_json(line) for line in file.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise refusal(str(file), f"can't be read ({one_line(error, 200)})", remedy) from error
    if not all(isinstance(line, dict) for line in lines):
        raise refusal(str(file), "has lines that are no objects", remedy)
    return lines


def flat_intervals(intervals: Mapping[str, Any], group: str = "") -> dict[str, Interval]:
    """The figures of results.json by their names, `b` within `a` as `a/b`."""
    found: dict[str, Interval] = {}
    for name, each in intervals.items():
        if "mean" not in each or isinstance(each["mean"], Mapping):
            found |= flat_intervals(each, f"{group}{name}/")
        else:
            found[f"{group}{name}"] = Interval.from_json(each)
    return found


def evaluator_of(evaluation: Evaluation) -> type[Evaluator]:
    """The class that the figures are of. Raises InputError for a user's that is gone."""
    return EVALUATORS.find(evaluation.results["benchmark"])


def by_record(evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """Id of a record -> its lines, one of every run of a judge; records that were left out have none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in evaluation.lines:
        if "figures" in line:
            found.setdefault(line["record"]["id"], []).append(line)
    return found


# ---- the comparison ----------------------------------------------------------------------------------


def compare(
    first: Evaluation | str | Path,
    second: Evaluation | str | Path,
    names: tuple[str, str] = ("the first", "the second"),
) -> Comparison:
    """Compare two results of one benchmark, as `evaluate` returns them, or their folders.

    names: of the models, for the sentence. Records that one of them lacks are left out, and counted. Raises
    InputError for results of different benchmarks, or of different questions under the same ids.
    """
    one, other = (
        each if isinstance(each, Evaluation) else read_evaluation(each) for each in (first, second)
    )
    benchmark, theirs = (each.results["benchmark"] for each in (one, other))
    if benchmark != theirs:
        raise refusal(names[1], f"is of {theirs}, and {names[0]} of {benchmark}", "compare one benchmark")
    before, after = by_record(one), by_record(other)
    common = [id for id in before if id in after]
    if not common:
        raise refusal(names[1], f"has no record that {names[0]} has", SAME)
    others = [id for id in common if _asked(before[id][0]) != _asked(after[id][0])]
    if others:
        problem = f"{len(others)} records are other questions than those of {names[0]}: {first_few(others)}"
        raise refusal(names[1], problem, SAME)
    evaluator = evaluator_of(one)
    groups = [before[id][0]["record"]["group"] for id in common]
    pairs = [_sums(groups, [each[id] for id in common]) for each in (before, after)]
    settings = tuple(name for name in _settings(one) if _settings(one)[name] != _settings(other).get(name))
    return Comparison(
        benchmark,
        names,
        differences(evaluator, *pairs),
        len(common),
        (len(before) - len(common), len(after) - len(common)),
        settings,
    )


def _asked(line: Mapping[str, Any]) -> Any:
    record = line["record"]
    return record["question"], [Path(each).name for each in record["images"]]


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    config = evaluation.results.get("config") or {}
    return {name: value for name, value in config.items() if name not in ("data", "kind")}


def _sums(groups: Sequence[str], records: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[Sums, int]:
    """Sums of groups, and how many runs they are of."""
    runs = [[line["figures"] for line in lines] for lines in records]
    return added(list(zip(groups, runs, strict=True))), len(runs[0])


def differences(
    evaluator: type[Evaluator], first: tuple[Sums, int], second: tuple[Sums, int]
) -> dict[str, Difference]:
    """Every figure that both have, with its difference over the same groups."""
    both = first[0], second[0]
    names = [name for name in names_of(both[0]) if name in names_of(both[1])]
    found = {}
    for name in filterfalse(hidden, names):
        about = [group for group in both[0] if name in both[0][group] or name in both[1][group]]
        tables = [table_of({g: sums[g] for g in about}, [name], runs) for sums, runs in (first, second)]
        found[name] = _difference(tables, mean, mean, evaluator.way(name))
    whole = [table_of(sums, names, runs) for sums, runs in (first, second)]
    for name, statistic in evaluator.derived.items():
        before, after = (derive(statistic, names, runs) for _, runs in (first, second))
        with suppress(KeyError):  # of a figure that one of them lacks
            found[name] = _difference(whole, before, after, evaluator.way(name))
    return found


def _difference(tables: Sequence[np.ndarray], before: Any, after: Any, way: int) -> Difference:
    """tables: [groups, columns] of each, the same groups in the same order."""
    cut = tables[0].shape[1]

    def less(means: np.ndarray) -> np.ndarray:
        return after(means[..., cut:]) - before(means[..., :cut])

    first, second = (float(of(table.mean(0))) for of, table in zip((before, after), tables, strict=True))
    return Difference(first, second, bootstrap(np.concatenate(tables, axis=1), less), way)
