"""What a writer is asked for who rewrites responses in its own words, and reviews what was rewritten.

Align2LLaVA (arXiv 2409.18541) has the language model inside the multimodal one rewrite instructions, so
that these read as what it would write, and review the result. Words are our own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mllm_align.annotate.pairwise import request
from mllm_align.curation.written import Fault, again, of_another_length, unusable, words_of
from mllm_align.data.records import Message, Part, Record

LONGER = 0.5  # most difference in length, as a share of the words

WRITE = """Below stand a request about an image and a response to it. You do not see the image. Rewrite the
response in your own words, as you would have written it.

Everything that it says must stay: each object, attribute, number, position and relation. Add nothing, and
leave nothing out. Keep the length about the same, and keep the form that the request asks for. Write the
new response alone: no heading, no quotation marks, no explanation.

Request: {request}
Response: {response}
New response:"""

REVIEW = """Below stand a request about an image, a response to it, and the same response in other words.
You do not see the image. Does the new response say the same as the first one, and answer the request as
well? It must name the same objects, attributes, numbers, positions and relations, add nothing, and be
fluent.

Request: {request}
Response: {response}
New response: {rewritten}

Write on the first line exactly "Yes" or "No", then the reason in one sentence."""


@dataclass(frozen=True)
class Rewriting:
    """A request for new words, about a record with its chosen response. number: of the attempt. before: the
    last attempt's answer, which could not be used, and why."""

    about: Record
    number: int = 1
    before: tuple[str, Fault] | None = None

    @property
    def text(self) -> str:
        text = WRITE.format(**_told(self.about))
        return text if self.before is None else again(text, self.number - 1, *self.before)

    @property
    def record(self) -> Record:
        return _alone(self.about, self.text)


@dataclass(frozen=True)
class Review:
    """A question whether a rewritten response says the same."""

    about: Record
    rewritten: str

    @property
    def text(self) -> str:
        return REVIEW.format(**_told(self.about), rewritten=self.rewritten)

    @property
    def record(self) -> Record:
        return _alone(self.about, self.text)


def _told(record: Record) -> dict[str, str]:
    return {"request": request(record), "response": record.responses[0].strip()}


def _alone(about: Record, text: str) -> Record:
    """A text as a record of its own, without images, under the id of the record that it is about."""
    return Record(about.id, (Message("user", (Part(text),)),), (), (), about.where)


def fault(chosen: str, text: str) -> Fault | None:
    """Why a cleaned answer can't stand for the chosen response; None if it is to be reviewed."""
    bad = unusable(chosen, text)
    return bad or of_another_length(words_of(chosen), words_of(text), LONGER)


def approved(answer: str) -> bool | None:
    """What a review says; None unless its first line is yes or no."""
    line = next((line for line in answer.splitlines() if line.strip()), "")
    found = re.fullmatch(r"\W*(yes|no)\b(\W.*)?", line.strip(), re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def objection(answer: str) -> Fault:
    """What the writer is told of a review that says no."""
    said = " ".join(answer.split()).removeprefix("No").strip(" .,:;-")
    return Fault(
        "not approved", f"a review says that it is not the same ({said[:400] or 'no reason given'})"
    )
