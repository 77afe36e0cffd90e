"""What a writer wrote, and whether it is a response at all."""

from __future__ import annotations

import re
from typing import NamedTuple

WORDS = 3  # of difference in length that are no fault
SHOWN = 2000  # characters of an earlier answer that are shown

AGAIN = """

Attempt {number} can't be used: {problem}. It was:
{answer}

Write another one.
New response:"""

_REFUSES = re.compile(
    r"\A\W*(i['’]?m (very |so )?sorry|sorry\b|i (can(no|['’])t|am (unable|not able)|won['’]t)\b"
    r"|as an? (ai|language model)\b)",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"\A\W*(here (is|are)|here['’]s|sure|certainly|of course|okay|example \d"
    r"|(the )?((new|changed|rewritten|modified|altered|incorrect|wrong|final|original) )?"
    r"(response|answer|text|version|description|output))\b[^\n]{0,100}?:",
    re.IGNORECASE,
)
_EXPLAINS = re.compile(
    r"\bi (have |['’]ve )?(changed|replaced|swapped|altered|modified|rewrote|kept)\b"
    r"|\b(was|were|been) (changed|replaced|swapped|altered|modified) (from|to|with|by)\b"
    r"|\b(original|new|changed|modified|rewritten) (response|answer|text|version)\b"
    r"|\b(explanation|changes( made)?|note)\b\W*:|->|→|</?[a-z]+>",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Fault(NamedTuple):
    """Why an answer can't be used: a name to count it by, and what the writer is told."""

    name: str
    told: str


REFUSED = Fault("refused", "it is no response, but says why you would not write one")


def cleaned(answer: str, chosen: str) -> str:
    """An answer without white space around it, and without marks around all of it that the chosen response
    has not."""
    text = answer.strip()
    for first, last in (("```", "```"), ('"', '"'), ("“", "”"), ("**", "**")):
        around = text.startswith(first) and text.endswith(last) and len(text) > len(first + last)
        inside = text[len(first) : len(text) - len(last)]
        if around and first not in inside and not chosen.strip().startswith(first):
            text = inside.strip()
    return text


def words_of(text: str) -> list[str]:
    """Without case and punctuation."""
    return [word.casefold() for word in _WORD.findall(text)]


def unusable(chosen: str, text: str) -> Fault | None:
    """Why a cleaned answer is no response, as the chosen one is; None if it is one."""

    def added(pattern: re.Pattern[str]) -> bool:
        """Whether the answer has what the chosen response has not."""
        return pattern.search(text) is not None and pattern.search(chosen.strip()) is None

    if not words_of(text):
        return Fault("empty", "it is empty")
    if added(_REFUSES):
        return REFUSED
    if added(_HEADING):
        return Fault("with a heading", "something stands before the response")
    if "<image>" in text:  # readers would take it for the place of an image
        return Fault("with a placeholder", "it has <image> in it")
    if added(_EXPLAINS):
        return Fault("explained", "it speaks of the changes; write the response alone")
    return None


def of_another_length(before: list[str], after: list[str], share: float) -> Fault | None:
    """A fault where the number of words differs by more than WORDS, and this share of them."""
    if abs(len(after) - len(before)) <= max(WORDS, share * len(before)):
        return None
    much = "longer" if len(after) > len(before) else "shorter"
    return Fault("of another length", f"it is much {much} than the response; keep the length")


def again(text: str, number: int, answer: str, problem: Fault) -> str:
    """A request, with the answer number `number` to it and why that can't be used. At temperature 0 the
    same request would get the same answer."""
    return text + AGAIN.format(
        number=number, problem=problem.told, answer=answer.strip()[:SHOWN] or "(nothing)"
    )
