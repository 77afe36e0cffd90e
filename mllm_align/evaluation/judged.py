"""Benchmarks whose answers a judge rates: what a verdict is about, how it is read, which figures come of
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mllm_align.config.parts import DataConfig
from mllm_align.evaluation.base import Evaluator, Item, Scored


@dataclass(frozen=True)
class Judged(Evaluator):
    """Base class of evaluators that score a judge's verdicts on the answers; an answer alone has no score.

    headline: the figure that runs of the judge are told by. groups: what the figures of groups of questions
    stand under. unread: what becomes of a verdict that can't be read.
    """

    headline: ClassVar[str] = "score"
    groups: ClassVar[str] = "by_category"
    unread: ClassVar[str] = "left out of the figures"

    def reviewed(self, data: Any, config: DataConfig, rows: list[dict[str, Any]]) -> list[Item]:
        """The questions that verdicts are wanted on. rows: those that are there."""
        return self.items(data, config)

    def reviews(self, value: Any) -> list[Any]:
        """The verdicts of a file, a row each: its text is `content`, and `run` says which run of the judge
        it is of, where there are several. value: the file's rows, or its one JSON value."""
        return value if isinstance(value, list) else [value]

    def review_key(self, row: Mapping[str, Any]) -> str:
        """The id of the record that a verdict is about. Raises KeyError without one."""
        return str(row["question_id"])

    def verdict(self, item: Item, text: str) -> Scored:
        """The figures that follow from a verdict. details: what was read, in the benchmark's own names of
        fields, and `unparsable` if nothing could be."""
        raise NotImplementedError

    def score(self, item: Item, answer: str) -> Scored:
        return Scored({})
