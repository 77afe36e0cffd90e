"""Exact counts of hallucinations in a model's captions of a scene, and metrics computed from them.

CHAIR (Rohrbach et al. 2018, "Object Hallucination in Image Captioning"): CHAIR_i is the share of mentioned
things that are not in the picture, CHAIR_s the share of captions that mention at least one such thing. The
original relies on synonym lists and human annotation; here the picture and the grammar are known, so every
claim, also of colour, size, place and relation, is checked exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import numpy as np

from mllm_align.evaluation.intervals import Interval, bootstrap
from mllm_align.testbed.scenes.language import (
    SENTENCE,
    Mention,
    Reading,
    parse,
    place,
    presence,
    relation,
)
from mllm_align.testbed.scenes.world import KINDS, Scene, partner


@dataclass(frozen=True)
class Counts:
    """Counts of one caption or, added up, of many.

    mentions: things said to be present, once per mention. A sentence outside the grammar that names no
    known thing counts as one hallucinated mention, so that babble is not rewarded as caution. hallucinated:
    mentions whose kind is not in the picture. with_hallucination: captions with any. expected: hallucinated
    mentions whose partner is mentioned in the same caption. present, recalled: things in the picture; those
    mentioned at least once. attributes, places, relations: claims of colour or size, of region, and of
    arrangement about things in the picture; with `_wrong`: how many of them are wrong. unparsed: sentences
    outside the grammar. stuttered: sentences that say a word twice in a row.
    """

    captions: int = 0
    mentions: int = 0
    hallucinated: int = 0
    with_hallucination: int = 0
    expected: int = 0
    present: int = 0
    recalled: int = 0
    attributes: int = 0
    attributes_wrong: int = 0
    places: int = 0
    places_wrong: int = 0
    relations: int = 0
    relations_wrong: int = 0
    sentences: int = 0
    unparsed: int = 0
    words: int = 0
    stuttered: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


# Each metric is the ratio of two counts.
FIGURES: Mapping[str, tuple[str, str]] = {
    "chair_i": ("hallucinated", "mentions"),
    "chair_s": ("with_hallucination", "captions"),
    "recall": ("recalled", "present"),
    "expected_share": ("expected", "hallucinated"),
    "attribute_error": ("attributes_wrong", "attributes"),
    "place_error": ("places_wrong", "places"),
    "relation_error": ("relations_wrong", "relations"),
    "unparsed": ("unparsed", "sentences"),
    "stutter": ("stuttered", "sentences"),
    "mentions": ("mentions", "captions"),
    "words": ("words", "captions"),
}
_STUTTER = re.compile(r"\b(\w+)\s+\1\b", re.IGNORECASE)
_COLUMN = {field.name: i for i, field in enumerate(fields(Counts))}


class PopeQuestion(NamedTuple):
    """A yes-or-no question; `answer` is True for yes."""

    mode: str
    kind: str
    question: str
    answer: bool


def count(scene: Scene, text: str) -> Counts:
    """Return the counts of one caption of a scene."""
    reading = parse(text)
    kinds = {mention.kind for mention in reading.mentions}
    absent = [mention for mention in reading.mentions if mention.kind not in scene.kinds]
    babble = _babble(reading)
    attributes, places = _claims(scene, reading.mentions)
    relations = _relations(scene, reading)
    return Counts(
        captions=1,
        mentions=len(reading.mentions) + babble,
        hallucinated=len(absent) + babble,
        with_hallucination=int(bool(absent or babble)),
        expected=sum(partner(mention.kind) in kinds for mention in absent),
        present=len(set(scene.kinds)),
        recalled=len(kinds & set(scene.kinds)),
        attributes=len(attributes),
        attributes_wrong=attributes.count(False),
        places=len(places),
        places_wrong=places.count(False),
        relations=len(relations),
        relations_wrong=relations.count(False),
        sentences=reading.sentences,
        unparsed=len(reading.unparsed),
        words=len(text.split()),
        stuttered=sum(_STUTTER.search(sentence) is not None for sentence in SENTENCE.findall(text)),
    )


def figures(counts: Sequence[Counts]) -> dict[str, float]:
    """Return every metric of FIGURES over all captions together; 0 where the denominator is 0."""
    total = _matrix(counts).sum(0)
    return {name: float(_ratio(total, name)) for name in FIGURES}


def intervals(counts: Sequence[Counts], seed: int = 0) -> dict[str, Interval]:
    """Return every metric of FIGURES with its bootstrap interval over captions."""
    items = _matrix(counts)
    return {
        name: bootstrap(items, lambda means, name=name: _ratio(means, name), seed=seed) for name in FIGURES
    }


def hallucinated_spans(scene: Scene, text: str) -> list[tuple[int, int]]:
    """Return the span [start, stop) of every word that names an absent thing."""
    return [mention.span for mention in parse(text).mentions if mention.kind not in scene.kinds]


def pope_questions(scene: Scene, rng: np.random.Generator, popular: Sequence[str]) -> list[PopeQuestion]:
    """Return one question with answer yes and one with answer no for each mode of POPE (Li et al. 2023).

    The absent thing asked about is, in mode `random`, any; in `popular`, the first absent kind of `popular`
    (kinds, the most frequent in training first); in `adversarial`, the absent partner of a thing in the
    picture. A mode without such a thing is left out, with both questions.
    """
    absent = [kind for kind in KINDS if kind not in scene.kinds]
    negatives = {
        "random": absent,
        "popular": [kind for kind in popular if kind in absent][:1],
        "adversarial": [partner(kind) for kind in scene.kinds if partner(kind) in absent],
    }
    return [
        PopeQuestion(mode, kind, presence(scene, kind, rng).question, answer)
        for mode, options in negatives.items()
        if options
        for kind, answer in ((_pick(scene.kinds, rng), True), (_pick(options, rng), False))
    ]


def _babble(reading: Reading) -> int:
    """The number of sentences outside the grammar that name no known thing."""
    return sum(not parse(sentence).mentions for sentence in reading.unparsed)


def _claims(scene: Scene, mentions: Sequence[Mention]) -> tuple[list[bool], list[bool]]:
    """Return whether each claim of colour or size, and of place, about present things is true."""
    attributes, places = [], []
    for mention in mentions:
        thing = scene.find(mention.kind)
        if thing is None:
            continue
        claims = ((mention.colour, thing.colour), (mention.size, thing.size))
        attributes += [claim == truth for claim, truth in claims if claim]
        places += [mention.where == place(scene, thing)] if mention.where else []
    return attributes, places


def _relations(scene: Scene, reading: Reading) -> list[bool]:
    """Return whether each claimed relation between two present things is true."""
    verdicts = []
    for claim in reading.relations:
        first = scene.find(reading.mentions[claim.first].kind)
        second = scene.find(reading.mentions[claim.second].kind)
        if first and second:
            verdicts.append(relation(first, second) == claim.relation)
    return verdicts


def _matrix(counts: Sequence[Counts]) -> np.ndarray:
    """Return [captions, fields] float64."""
    return np.array([astuple(one) for one in counts], np.float64).reshape(-1, len(_COLUMN))


def _ratio(totals: np.ndarray, figure: str) -> np.ndarray:
    """Return a metric from sums or means of counts, [..., fields] -> [...]."""
    above, below = (totals[..., _COLUMN[name]] for name in FIGURES[figure])
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0.0)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
