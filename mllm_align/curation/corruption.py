"""What a writer of rejected responses is asked for, and whether what it wrote can be used.

The changes are those of the controlled sets of arXiv 2407.02477: objects, attributes, counts, positions or
relations, so that the text stays plausible without the image. Words and examples are our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from mllm_align.annotate.pairwise import request
from mllm_align.data.records import Message, Part, Record
from mllm_align.report.page import differing

SHORT = 10  # words: of fewer, all may be others
LEFT = 0.5  # least words in common of a longer text
LONGER, WORDS = 0.25, 3  # most difference in length: this share of the words, or so many
SHOWN = 2000  # characters of an earlier answer that are shown

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


@dataclass(frozen=True)
class Kind:
    """A kind of change. told: what the writer is to change. examples: two, each as request, response and
    the changed response."""

    name: str
    told: str
    examples: tuple[tuple[str, str, str], tuple[str, str, str]]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "objects",
            "objects: put other things, animals, people or places in the place of those that it names",
            (
                (
                    "What is on the kitchen counter?",
                    "A toaster stands beside a bowl of lemons, and a blue towel hangs from the drawer.",
                    "A kettle stands beside a bowl of lemons, and a blue apron hangs from the drawer.",
                ),
                (
                    "Describe the picture briefly.",
                    "Two women walk past a bakery; one of them carries an umbrella.",
                    "Two women walk past a pharmacy; one of them carries a suitcase.",
                ),
            ),
        ),
        Kind(
            "attributes",
            "attributes: colours, sizes, materials, states, clothes, the weather, the time of day",
            (
                (
                    "What does the car look like?",
                    "It is a small red car with a closed roof, and its tyres are covered with mud.",
                    "It is a small green car with an open roof, and its tyres are covered with snow.",
                ),
                (
                    "What is the weather like?",
                    "The sky is overcast, and the street is wet.",
                    "The sky is clear, and the street is dry.",
                ),
            ),
        ),
        Kind(
            "counts",
            "counts: how many there are of the things that it names",
            (
                (
                    "How many chairs are at the table?",
                    "There are four chairs at the table, and one of them is empty.",
                    "There are six chairs at the table, and two of them are empty.",
                ),
                (
                    "Describe the shelf.",
                    "The shelf holds three rows of books and a single plant.",
                    "The shelf holds two rows of books and a pair of plants.",
                ),
            ),
        ),
        Kind(
            "positions",
            "positions: where things are, in the image and to each other",
            (
                (
                    "Where is the cat?",
                    "The cat lies on the left end of the sofa, below a window.",
                    "The cat lies on the right end of the sofa, opposite a window.",
                ),
                (
                    "Describe the picture briefly.",
                    "A lamp stands in the foreground, and a bicycle leans against the wall behind it.",
                    "A lamp stands in the background, and a bicycle leans against the wall in front of it.",
                ),
            ),
        ),
        Kind(
            "relations",
            "relations: who does what, to whom or with what",
            (
                (
                    "What are the two people doing?",
                    "The woman hands a cup to the man, who is reading a newspaper.",
                    "The woman takes a cup from the man, who is folding a newspaper.",
                ),
                (
                    "What is the dog doing?",
                    "The dog is pulling the boy on a sledge up the hill.",
                    "The boy is pulling the dog on a sledge up the hill.",
                ),
            ),
        ),
    )
}

PROMPT = """Below stand a request about an image and a response that is true of the image. You do not see
the image. Rewrite the response so that it is no longer true. Change its {told}.

Whoever reads the new response without the image must find nothing odd in it: it is fluent, it contradicts
neither itself nor the request, and what it says is as likely in such an image as what the response said.
Change what is meant: another word for the same thing is no change, and neither is leaving something out.
Where the response says nothing of that kind, change what comes closest to it. Keep everything else word for
word, and the length. Write the new response alone: no heading, no quotation marks, no explanation.

{examples}

Now the real one.
Request: {request}
Response: {response}
New response:"""

EXAMPLE = """Example {number}.
Request: {request}
Response: {response}
New response: {changed}"""

AGAIN = """

Attempt {number} can't be used: {problem}. It was:
{answer}

Write another one.
New response:"""


def kinds_of(names: Sequence[str], seed: int) -> list[str]:
    """The kind that is asked for of each record, by its name: every kind equally often, give or take one.
    They follow one another in an order of the records that is drawn by seed and names."""
    order = sorted(range(len(names)), key=lambda i: sha256(f"{seed} {names[i]}".encode()).digest())
    kinds, found = list(KINDS), [""] * len(names)
    for turn, place in enumerate(order):
        found[place] = kinds[turn % len(kinds)]
    return found


@dataclass(frozen=True)
class Asked:
    """One request to the writer: a text without an image, about a record with its chosen response. number:
    of the attempt. before: the last attempt's answer, which could not be used, and why."""

    about: Record
    kind: str
    number: int = 1
    before: tuple[str, Fault] | None = None

    @property
    def text(self) -> str:
        kind = KINDS[self.kind]
        examples = [
            EXAMPLE.format(number=number, request=asked, response=response, changed=changed)
            for number, (asked, response, changed) in enumerate(kind.examples, 1)
        ]
        fields = {"request": request(self.about), "response": self.about.responses[0].strip()}
        text = PROMPT.format(told=kind.told, examples="\n\n".join(examples), **fields)
        if self.before is not None:
            answer, fault = self.before
            shown = answer.strip()[:SHOWN] or "(nothing)"
            text += AGAIN.format(number=self.number - 1, problem=fault.told, answer=shown)
        return text

    @property
    def record(self) -> Record:
        """The request as a record of its own, under the id of the record that it is about."""
        turn = Message("user", (Part(self.text),))
        return Record(self.about.id, (turn,), (), (), self.about.where)


# ---- what came back ----------------------------------------------------------------------------------


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


def fault(chosen: str, text: str) -> Fault | None:
    """Why a cleaned answer is no rejected response for the chosen one; None if it is one."""

    def added(pattern: re.Pattern[str]) -> bool:
        """Whether the answer has what the chosen response has not."""
        return pattern.search(text) is not None and pattern.search(chosen.strip()) is None

    before, after = ([word.casefold() for word in _WORD.findall(each)] for each in (chosen, text))
    if not after:
        return Fault("empty", "it is empty")
    if added(_REFUSES):
        return REFUSED
    if added(_HEADING):
        return Fault("with a heading", "something stands before the response")
    if "<image>" in text:  # readers would take it for the place of an image
        return Fault("with a placeholder", "it has <image> in it")
    if added(_EXPLAINS):
        return Fault("explained", "it speaks of the changes; write the response alone")
    if before == after:
        return Fault("unchanged", "it says the same as the response; change what is meant")
    if abs(len(after) - len(before)) > max(WORDS, LONGER * len(before)):
        much = "longer" if len(after) > len(before) else "shorter"
        return Fault("of another length", f"it is much {much} than the response; keep the length")
    if len(before) >= SHORT and differing(chosen, text)[2] < LEFT:
        return Fault("another text", "hardly anything of the response is left; keep the rest word for word")
    return None
