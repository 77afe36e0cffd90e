"""What a writer of rejected responses is asked for, and whether what it wrote can be used.

The changes are those of the controlled sets of arXiv 2407.02477: objects, attributes, counts, positions or
relations, so that the text stays plausible without the image. Words and examples are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from mllm_align.annotate.pairwise import request
from mllm_align.curation.written import Fault, again, of_another_length, unusable, words_of
from mllm_align.data.records import Message, Part, Record
from mllm_align.report.page import differing

SHORT = 10  # words: of fewer, all may be others
LEFT = 0.5  # least words in common of a longer text
LONGER = 0.25  # most difference in length, as a share of the words


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
        return text if self.before is None else again(text, self.number - 1, *self.before)

    @property
    def record(self) -> Record:
        """The request as a record of its own, under the id of the record that it is about."""
        turn = Message("user", (Part(self.text),))
        return Record(self.about.id, (turn,), (), (), self.about.where)


def fault(chosen: str, text: str) -> Fault | None:
    """Why a cleaned answer is no rejected response for the chosen one; None if it is one."""
    before, after = words_of(chosen), words_of(text)
    if (bad := unusable(chosen, text)) is not None:
        return bad
    if before == after:
        return Fault("unchanged", "it says the same as the response; change what is meant")
    if (bad := of_another_length(before, after, LONGER)) is not None:
        return bad
    if len(before) >= SHORT and differing(chosen, text)[2] < LEFT:
        return Fault("another text", "hardly anything of the response is left; keep the rest word for word")
    return None
