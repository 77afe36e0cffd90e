"""What an annotator is asked and what it says: the protocol of everything that ranks responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from mllm_align.data.records import Record

Outcome = Literal["ranked", "tie", "identical", "empty", "unparsable", "disagreement", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Question:
    """Responses to one prompt. record: its id, messages and images; its own responses are not looked at."""

    record: Record
    responses: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """outcome: "ranked", or why there is no preference. scores: one for each response, the higher the
    better; of "ranked", and of a "tie" whose responses were scored one by one. reason: in the annotator's
    words. first, parsed: how many answers took the response shown first, of how many that took one:
    position bias."""

    outcome: Outcome
    scores: tuple[float, ...] = ()
    reason: str = ""
    first: int = 0
    parsed: int = 0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Verdict:
        """From `dataclasses.asdict`'s values, after JSON."""
        return cls(**{**values, "scores": tuple(values["scores"])})

    @property
    def ranking(self) -> tuple[int, ...]:
        """Numbers of the responses, the best first; empty without a preference."""
        places = range(len(self.scores)) if self.outcome == "ranked" else ()
        return tuple(sorted(places, key=lambda i: -self.scores[i]))

    @property
    def pair(self) -> tuple[int, int] | None:
        """(best, worst), or None: never made of a tie."""
        return (self.ranking[0], self.ranking[-1]) if self.outcome == "ranked" else None


class Annotator(Protocol):
    """Gives a verdict on each question, in order; the first call may load what it needs.

    Every process asks about all questions, together, if the annotator's config has `on_devices`; else each
    process asks about its own.
    """

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]: ...


def scored(scores: Sequence[float], reason: str = "", first: int = 0, parsed: int = 0) -> Verdict:
    """The verdict of one score for each response."""
    outcome: Outcome = "tie" if max(scores) == min(scores) else "ranked"
    return Verdict(outcome, tuple(map(float, scores)), reason, first, parsed)


def rank(annotator: Annotator, questions: Sequence[Question]) -> list[Verdict]:
    """The annotator's verdicts. It is not asked where all responses are the same text, nor where one says
    nothing: silence makes no mistake, and would win."""
    plain: list[Outcome | None] = [_plain(question) for question in questions]
    asked = [question for question, outcome in zip(questions, plain, strict=True) if outcome is None]
    said = iter(annotator(asked) if asked else [])
    return [next(said) if outcome is None else Verdict(outcome) for outcome in plain]


def _plain(question: Question) -> Outcome | None:
    """What can be told without asking."""
    texts = {response.strip() for response in question.responses}
    if "" in texts:
        return "empty"
    return "identical" if len(texts) == 1 else None


def counted(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts of each outcome."""
    found = Counter(v.outcome for v in verdicts)
    return {outcome: found[outcome] for outcome in OUTCOMES}
