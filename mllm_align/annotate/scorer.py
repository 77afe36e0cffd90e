"""A user's own function as the annotator."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_align.annotate.verdict import Question, Verdict, scored
from mllm_align.config.annotators import ANNOTATORS, AnnotatorConfig
from mllm_align.config.checks import check_types, require
from mllm_align.errors import InputError, one_line, refusal


@ANNOTATORS.register("scorer")
@dataclass(frozen=True)
class Scorer(AnnotatorConfig):
    """A Python function that scores responses: a reward model, a rule."""

    function: str = "package.module:function"
    """Called with a list of `Question`; returns a list of lists of floats, one for each response, the
    higher the better. Importable from where the command runs."""

    def __post_init__(self):
        check_types(self, "annotator.")
        module, colon, name = self.function.partition(":")
        require(bool(module and colon and name), "annotator.function", self.function, "module:function")

    def open(self, context: Any) -> ScorerHook:
        return ScorerHook(self)


class ScorerHook:
    """Ranks by the scores that a function gives; it is imported at once, from the current folder too.

    Raises InputError, here and when it is called, for all that goes wrong in it.
    """

    def __init__(self, config: Scorer):
        self.name = config.function
        self._function = self._imported()

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        try:
            given = self._function(list(questions))
        except (Exception, SystemExit) as error:  # the user's program: anything may come out of it
            raise self._fault(f"raises {_said(error)}", "mend the function") from error
        return [
            scored(row, ", ".join(f"{value:g}" for value in row)) for row in self._scores(given, questions)
        ]

    def _imported(self) -> Callable[[list[Question]], Any]:
        module, _, name = self.name.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # last: what is installed stays what it is
        try:
            home = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            remedy = "run the command where it is importable, or mend it"
            raise self._fault(f"can't be imported ({_said(error)})", remedy) from error
        place = getattr(home, "__file__", None) or module
        if not hasattr(home, name):
            raise self._fault(f"{place} has no {name!r}", "name a function that it has")
        if not callable(getattr(home, name)):
            raise self._fault(f"{name!r} in {place} can't be called", "name a function")
        return getattr(home, name)

    def _scores(self, given: Any, questions: Sequence[Question]) -> list[list[float]]:
        """What the function gave, as floats. Raises InputError unless it is a score for each response."""
        rows = self._listed(given, len(questions), "questions", "the result")
        return [
            [
                self._finite(value, f"score {i} of question {number}")
                for i, value in enumerate(
                    self._listed(row, len(question.responses), "responses", f"question {number}")
                )
            ]
            for number, (row, question) in enumerate(zip(rows, questions, strict=True))
        ]

    def _listed(self, value: Any, wanted: int, of: str, at: str) -> list[Any]:
        """The items of a list, an array or the like, as many as there are `of`."""
        if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
            raise self._shape(f"{at} is of type {type(value).__name__}")
        try:
            items = list(value)
        except TypeError:  # an array without axes
            raise self._shape(f"{at} has no items") from None
        if len(items) != wanted:
            raise self._shape(f"{at} has {len(items)} items for {wanted} {of}")
        return items

    def _finite(self, value: Any, at: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self._shape(f"{at} is of type {type(value).__name__}") from None
        if not math.isfinite(number):
            raise self._shape(f"{at} is {number}")
        return number

    def _shape(self, problem: str) -> InputError:
        return self._fault(problem, "return a list of lists of finite floats, one for each response")

    def _fault(self, problem: str, remedy: str) -> InputError:
        return refusal(f"annotator.function {self.name}", problem, remedy)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error, 300)}"
