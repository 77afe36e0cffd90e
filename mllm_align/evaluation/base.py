"""The protocol of an evaluator: what a model is asked, how its answers score, which figures come of it.

An evaluator is a frozen dataclass of its settings. Every answer gets sums and weights of named figures; a
figure is the sum over all records by the weight over all records, with a bootstrap interval over groups of
records. Accuracy is (right, 1), precision (true positives, positives), F1 (2 tp, 2 tp + fp + fn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from mllm_align.config.checks import check_types
from mllm_align.config.parts import DataConfig, JobConfig, SamplingConfig
from mllm_align.config.servers import BenchmarkJudge
from mllm_align.data.records import Record
from mllm_align.errors import InputError, one_line
from mllm_align.evaluation.intervals import Interval, bootstrap
from mllm_align.registry import Registry

if TYPE_CHECKING:
    from mllm_align.models.bundle import Bundle

EVALUATORS = Registry("evaluator", "mllm_align.evaluation.benchmarks", "mllm_align.testbed.evaluators")


class Rewards(NamedTuple):
    """What a reward model gives a record's K responses. tokens: their lengths, end of sequence included."""

    rewards: Sequence[float] | np.ndarray
    tokens: Sequence[int] | np.ndarray


Answer = str | tuple[np.ndarray, ...] | Rewards
Statistic = Callable[[Mapping[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Item:
    """What the model is asked once: a record with prompt and images; its responses are the references, or
    the answers whose log-probs or rewards are wanted. labels: what scoring needs besides, as JSON
    values."""

    record: Record
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """figures: name -> (sum, weight), or a number of weight 1; a figure that a record is not about is left
    out. The figure `a/b` is b within a in the results; `_a` is for `derived` alone. details: further fields
    of the record's line, as JSON values."""

    figures: Mapping[str, tuple[float, float] | float]
    details: Mapping[str, Any] = field(default_factory=dict)

    def sums(self) -> dict[str, list[float]]:
        """Every figure as [sum, weight]."""
        pairs = {n: each if isinstance(each, tuple) else (each, 1) for n, each in self.figures.items()}
        return {name: [float(total), float(weight)] for name, (total, weight) in pairs.items()}


@dataclass(frozen=True)
class Context:
    """What scoring may use. bundle: the model that is evaluated; None where answers came from a file.
    folder: where a judge's answers are kept; None keeps them in memory."""

    bundle: Bundle | None
    data: DataConfig
    folder: Path | None = None


@dataclass(frozen=True)
class Evaluator:
    """Base class of evaluators; subclasses are frozen dataclasses, and what they compute with is imported
    when it is needed.

    references: responses that every record must have. needs: a generated response to each prompt, or the
    log-probs of each record's `references` responses, or a reward model's rewards of them. derived: figures
    made of others, name -> function of their values, [...] arrays, that returns [...]. fields: what files
    of answers call the id of a record and its answer. partial: whether such a file may leave records out.
    ways: -1 for a figure that is better when lower, 0 for one that is neither; the others are better when
    higher. A name stands for the figures of all groups, too. folder: of the benchmark's data, where those
    of several lie side by side; default: its name.
    """

    references: ClassVar[int] = 0
    needs: ClassVar[Literal["responses", "logps", "rewards"]] = "responses"
    derived: ClassVar[Mapping[str, Statistic]] = {}
    fields: ClassVar[tuple[str, str]] = ("id", "response")
    partial: ClassVar[bool] = False
    ways: ClassVar[Mapping[str, int]] = {}
    folder: ClassVar[str | None] = None
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    """How responses are generated."""

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        """What the model is asked. data: as `train` takes it, or Items, which stay as they are."""
        from mllm_align.prepare import read_data

        if isinstance(data, Sequence) and data and all(isinstance(each, Item) for each in data):
            return list(data)
        return [Item(record) for record in read_data(data, config, self.references)]

    def asked(self, items: list[Item]) -> list[Item]:
        """Which of them a model is asked; default: all."""
        return items

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        """A line of a file of answers."""
        name, text = self.fields
        return {name: item.record.id, text: answer}

    def key(self, row: Mapping[str, Any]) -> str:
        """The id of the record that a line of a file of answers is about. Raises KeyError without one."""
        return str(row[self.fields[0]])

    def score(self, item: Item, answer: Any) -> Scored:
        """answer: the response's text, one that was generated without white space around it; or a tuple of
        log-probs, nats per token, for each of the record's responses; or their `Rewards`."""
        raise NotImplementedError

    def score_all(self, items: Sequence[Item], answers: Sequence[Any], context: Context) -> list[Scored]:
        """The same of all records at once, for what asks a judge. Every process calls it; what asks an
        endpoint does so on the first alone (`processes.on_first`)."""
        return [self.score(item, answer) for item, answer in zip(items, answers, strict=True)]

    def versions(self) -> dict[str, str]:
        """Versions, for the results, of libraries that the figures depend on; default: none."""
        return {}

    def group(self, item: Item) -> str:
        """Records of one group are drawn together by the bootstrap; default: each is its own."""
        return item.record.id

    @classmethod
    def given(cls) -> int:
        """How many of a record's responses the model is shown."""
        return 0 if cls.needs == "responses" else cls.references

    @classmethod
    def way(cls, name: str) -> int:
        """Whether a figure is better when higher (1) or lower (-1), or neither (0)."""
        return 0 if hidden(name) else cls.ways.get(name, cls.ways.get(name.rpartition("/")[2], 1))


def hidden(name: str) -> bool:
    """Whether a figure is only there for others to be made of."""
    return name.startswith("_")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(JobConfig):
    """Evaluations on all benchmarks that are found; the judge is asked where one scores the answers."""

    judge: BenchmarkJudge = field(default_factory=BenchmarkJudge)


@dataclass(frozen=True)
class EvaluationConfig(SuiteConfig):
    """One evaluation."""

    evaluator: Evaluator = field(default_factory=lambda: EVALUATORS["scenes"]())
    """Which benchmark: KIND on the command line, which may be a class in a file of your own,
    my_eval.py:Mine."""

    def __post_init__(self):
        check_evaluator(self.evaluator)
        super().__post_init__()


def open_evaluator(evaluator: Evaluator | str) -> Evaluator:
    """An evaluator as it is; of a name, or a user's `file.py:Name`, the one with its default settings."""
    return EVALUATORS.find(evaluator)() if isinstance(evaluator, str) else evaluator


def check_evaluator(evaluator: Any) -> None:
    """Raises InputError for an evaluator that does not keep the contract."""
    kind, name = type(evaluator), type(evaluator).__name__
    if not isinstance(evaluator, Evaluator):
        raise InputError(f"evaluator {name} is no mllm_align.Evaluator; derive it from that class")
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise InputError(f"evaluator {name} is no frozen dataclass; put @dataclass(frozen=True) above it")
    if kind.score is Evaluator.score and kind.score_all is Evaluator.score_all:
        raise InputError(f"evaluator {name} has no score(item, answer); give it one")
    if kind.needs not in ("responses", "logps", "rewards"):
        raise InputError(f"evaluator {name} needs {kind.needs!r}; it must be responses, logps or rewards")
    if not isinstance(kind.references, int) or kind.references < (kind.needs != "responses"):
        raise InputError(f"evaluator {name} does not say how many answers a record has (references = 2)")
    check_types(evaluator, "evaluator.")


# ---- figures -----------------------------------------------------------------------------------------


Sums = dict[str, dict[str, np.ndarray]]  # group -> figure -> [runs, 2], sum and weight


def figures(evaluator: Evaluator, items: Sequence[Item], *runs: Sequence[Scored]) -> dict[str, Interval]:
    """Every figure with its interval: n is the number of groups that it is about. A figure of weight 0 is
    0; a derived one that is made of a figure of no record is left out. runs: the scores of all items, once
    or several times: a figure is then the mean over the runs that have it."""
    rows = zip(items, *runs, strict=True)
    sums = added([(evaluator.group(item), [one.sums() for one in each]) for item, *each in rows])
    found = {}
    for name in filterfalse(hidden, names_of(sums)):
        found[name] = bootstrap(np.array([own[name].ravel() for own in sums.values() if name in own]), mean)
    every = table_of(sums, names_of(sums), len(runs))
    for name, statistic in evaluator.derived.items():
        with suppress(KeyError):  # no record is about what it is made of
            found[name] = bootstrap(every, derive(statistic, names_of(sums), len(runs)))
    return found


def added(rows: Sequence[tuple[str, Sequence[Mapping[str, Sequence[float]]]]]) -> Sums:
    """rows: the group of each record, and its sums of every run."""
    groups: Sums = {}
    for group, runs in rows:
        own = groups.setdefault(group, {})
        for run, sums in enumerate(runs):
            for name, pair in sums.items():
                own.setdefault(name, np.zeros((len(runs), 2)))[run] += pair
    return groups


def names_of(sums: Sums) -> list[str]:
    return list(dict.fromkeys(name for own in sums.values() for name in own))


def table_of(sums: Sums, names: Sequence[str], runs: int) -> np.ndarray:
    """[groups, names x runs x 2]; 0 where a group has no such figure."""
    none = np.zeros((runs, 2))
    return np.array([[own.get(name, none) for name in names] for own in sums.values()]).reshape(
        len(sums), -1
    )


def mean(means: np.ndarray) -> np.ndarray:
    """A figure over its runs: [..., runs x 2] -> [...]."""
    pairs = means.reshape(*means.shape[:-1], -1, 2)
    return _ratio(pairs).sum(-1) / np.maximum((pairs[..., 1] > 0).sum(-1), 1)


def derive(statistic: Statistic, names: Sequence[str], runs: int) -> Callable[[np.ndarray], np.ndarray]:
    """A figure that is made of others: [..., names x runs x 2] -> [...]."""

    def value(means: np.ndarray) -> np.ndarray:
        pairs = means.reshape(*means.shape[:-1], len(names), runs, 2)
        return statistic({name: _ratio(pairs[..., i, :, :]) for i, name in enumerate(names)}).mean(-1)

    return value


def _ratio(means: np.ndarray) -> np.ndarray:
    """[..., 2] -> [...]."""
    total, weight = means[..., 0], means[..., 1]
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1), 0.0)


def check_items(evaluator: Evaluator, items: Any) -> list[Item]:
    """Raises InputError unless there are Items, and at least one."""
    name = type(evaluator).__name__
    if not isinstance(items, list) or not all(isinstance(each, Item) for each in items):
        raise InputError(f"evaluator {name}: items(data, config) gives no list of Item; return one")
    if not items:
        raise InputError(f"evaluator {name}: items(data, config) gives no records; return at least one")
    return items


def check_scored(evaluator: Evaluator, scored: Sequence[Any], items: Sequence[Item]) -> None:
    """Raises InputError unless there is a Scored of finite figures for every item."""
    who = f"evaluator {type(evaluator).__name__} gives"
    if len(scored) != len(items):
        raise InputError(f"{who} {len(scored)} scores for {len(items)} records; return one for each")
    for item, each in zip(items, scored, strict=True):
        if not isinstance(each, Scored):
            raise InputError(f"{who} {type(each).__name__} for {item.record.where}; return Scored(...)")
        try:
            good = all(math.isfinite(x) and math.isfinite(w) and w >= 0 for x, w in each.sums().values())
        except (TypeError, ValueError):
            good = False
        if not good:
            problem = f"{who} {one_line(each.figures, 200)} for {item.record.where}"
            raise InputError(f"{problem}; give each figure a finite sum and a weight of 0 or more")
