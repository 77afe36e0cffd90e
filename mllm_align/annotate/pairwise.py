"""A model asked, in both orders, which of two responses is better; its answer is read strictly.

The criteria are those of arXiv 2407.02477, section 3, in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from mllm_align.annotate.verdict import Question, Verdict, scored
from mllm_align.data.preferences import conversation
from mllm_align.data.records import Message, Part, Record

PROMPT = """You compare two responses to a request about the image{plural}.

Request:
{request}

Response 1:
{first}

Response 2:
{second}

Which response is better? Look at the image{plural} closely. Prefer first the response that says less that
is not true of the image{plural}: objects that are not there, wrong attributes such as colours and counts,
wrong positions or relations. If they are equal in that, prefer the one that helps more with the request.
Neither the order nor the length of the responses matters.

Write on the first line exactly "Response 1", "Response 2" or "Tie", then the reason in one sentence."""

Answer = Literal[1, 2, "tie"]


@dataclass(frozen=True)
class Asked:
    """One comparison in one order."""

    record: Record
    first: str
    second: str

    @property
    def text(self) -> str:
        """What the judge reads beside the images."""
        plural = "s" if len(self.record.images) > 1 else ""
        fields = {"request": request(self.record), "first": self.first, "second": self.second}
        return PROMPT.format(plural=plural, **fields)

    @property
    def messages(self) -> tuple[Message, ...]:
        """One user turn: all images, then the text."""
        return (Message("user", (*[Part()] * len(self.record.images), Part(self.text))),)


def request(record: Record) -> str:
    """The prompt without its images and system turn; the turns of a longer conversation are named.

    A preference of the system is there: the answer has to follow it.
    """
    turns = [(m.role, m.text.strip()) for m in conversation(record) if m.role != "system"]
    turns = [(tier, text) for tier, text in record.preferences if tier == "system"] + turns
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def read(answer: str) -> Answer | None:
    """What an answer takes; None unless its first line takes one side, or a tie, and says no more of it."""
    line = next((line for line in answer.splitlines() if line.strip()), "").strip(" \t*_#\"'`.:")
    words = re.sub(r"[*_\"'`]+", "", line).lower()
    named = set(re.findall(r"\bresponse\s*([12])\b", words))
    rest = r"\s*[.:;,–—-](?!\s*[12]\b).*"  # a reason; but "Response 1, 2" names both
    if re.fullmatch(rf"response\s*[12]({rest}|\s+is better\b.*)?", words) and len(named) == 1:
        return 1 if "1" in named else 2
    return "tie" if re.fullmatch(rf"tie({rest})?", words) and not named else None


class Pairwise:
    """Ranks by comparing every two responses, in both orders.

    ask: answers of a model, None where none came. Two orders that disagree, or a tie in one of them, win
    nothing. Of more than two responses, wins count; one answer that can't be used spoils the group.
    """

    def __init__(self, ask: Callable[[Sequence[Asked]], list[str | None]]):
        self.ask = ask

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        asked: list[Asked] = []
        for question in questions:
            for a, b in _two(question):
                left, right = question.responses[a], question.responses[b]
                asked += [Asked(question.record, left, right), Asked(question.record, right, left)]
        answers = iter(self.ask(asked))
        return [
            verdict(question, [(next(answers), next(answers)) for _ in _two(question)])
            for question in questions
        ]


def _two(question: Question) -> list[tuple[int, int]]:
    """Numbers of every two responses that are different texts."""
    texts = [r.strip() for r in question.responses]
    return [(a, b) for a, b in combinations(range(len(texts)), 2) if texts[a] != texts[b]]


def verdict(question: Question, answers: Sequence[tuple[str | None, str | None]]) -> Verdict:
    """What the answers to all comparisons of a question come to, each in both orders."""
    wins, reasons, problems = [0] * len(question.responses), [], set()
    first = parsed = 0
    for (a, b), both in zip(_two(question), answers, strict=True):
        taken = [None if text is None else read(text) for text in both]
        first, parsed = first + taken.count(1), parsed + taken.count(1) + taken.count(2)
        reasons += [text.strip() for text in both if text]
        if None in both:
            problems.add("failed")
        elif None in taken:
            problems.add("unparsable")
        elif sorted(map(str, taken)) == ["1", "2"]:
            wins[a if taken[0] == 1 else b] += 1
        elif taken[0] == taken[1] != "tie":
            problems.add("disagreement")
    reason = " | ".join(reasons)
    for outcome in ("failed", "unparsable"):
        if outcome in problems:
            return Verdict(outcome, (), reason, first, parsed)
    if max(wins) == min(wins) and "disagreement" in problems:
        return Verdict("disagreement", (), reason, first, parsed)
    return scored(wins, reason, first, parsed)
