"""Benchmarks whose answers a judge rates: what it is asked, how its verdict is read, which figures come of
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mllm_align.config.parts import DataConfig
from mllm_align.evaluation.base import Evaluator, Item, Scored


@dataclass(frozen=True)
class Judged(Evaluator):
    """Base class of evaluators that score a judge's verdicts on the answers; an answer alone has no score,
    unless a subclass gives it one.

    judge_sees: whether the judge is shown the images, too. headline: the figure that runs of the judge are
    told by. groups: what the figures of groups of questions stand under. unread: what becomes of a verdict
    that can't be read.
    """

    judge_sees: ClassVar[bool] = False

    headline: ClassVar[str] = "score"
    groups: ClassVar[str] = "by_category"
    unread: ClassVar[str] = "left out of the figures"

    def to_judge(self, item: Item, answer: str) -> str:
        """What the judge is asked about an answer; for an endpoint or a model that is asked (`judge.url`,
        `judge.model`). Before the first question it is called with empty answers: what is missing from the
        data is told before the work. Raises InputError for an item that lacks something."""
        raise NotImplementedError

    def review(self, item: Item, text: str) -> dict[str, Any]:
        """A line of a file of verdicts; `review_key` and `content` give back its question and text."""
        return {"question_id": item.record.id, "content": text}

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

    def verdicts(self, items: Sequence[Item], texts: Sequence[str]) -> list[Scored]:
        """The same of all questions at once, where figures are of several questions together."""
        return [self.verdict(item, text) for item, text in zip(items, texts, strict=True)]

    def score(self, item: Item, answer: str) -> Scored:
        return Scored({})

    @property
    def scores_answers(self) -> bool:
        """Whether answers alone have a score."""
        own = type(self)
        return own.score is not Judged.score or own.score_all is not Judged.score_all
