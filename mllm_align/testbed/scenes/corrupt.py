"""True captions made false: the testbed's stand-in for rejected responses that a stronger model writes.

A few facts of the text are changed so that it stays plausible to who does not see the picture; all other
words stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from mllm_align.testbed.scenes.language import (
    PLACES,
    RELATIONS,
    Reading,
    parse,
    place,
    relation,
    with_preposition,
)
from mllm_align.testbed.scenes.world import COLOURS, KINDS, SIZES, Scene, partner

T = TypeVar("T")
_SENTENCE = re.compile(r"[^.!?\n]+")


@dataclass(frozen=True)
class _Fact:
    """Words that claim something, and false ones for their place.

    sort: kind, attribute, place or relation. usual: of a kind, the partner of what it is named with.
    """

    sort: str
    start: int
    words: str
    others: tuple[str, ...]
    usual: str | None = None


def corrupt(scene: Scene, text: str, rng: np.random.Generator, most: int = 3) -> str:
    """Return the text with one to `most` of its facts changed: kinds, colours or sizes, places, relations.

    Every sort of fact is equally likely. Half of the changed kinds become the usual partner of the other
    thing of the sentence, or of themselves where there is none, unless that is in the picture; all others
    any kind that is neither there nor named. Whatever is changed is false afterwards. Raises ValueError
    for a text that claims nothing.
    """
    facts = [fact for fact in _facts(scene, text) if fact.others]
    if not facts:
        raise ValueError(f"claims nothing that could be changed: {text!r}")
    changes: dict[_Fact, str] = {}
    for _ in range(int(rng.integers(1, most + 1))):
        options = {f: _left(f, changes) for f in facts if f not in changes}
        sorts = sorted({fact.sort for fact, words in options.items() if words})
        if sorts:
            sort = _pick(sorts, rng)
            fact = _pick([fact for fact, words in options.items() if words and fact.sort == sort], rng)
            usual = fact.usual in options[fact] and rng.random() < 0.5
            changes[fact] = str(fact.usual) if usual else _pick(options[fact], rng)
    for fact in sorted(changes, key=lambda each: -each.start):
        text = text[: fact.start] + changes[fact] + text[fact.start + len(fact.words) :]
    return _articles(text)


def _left(fact: _Fact, changes: dict[_Fact, str]) -> list[str]:
    """What may still be said: no kind twice."""
    return [words for words in fact.others if fact.sort != "kind" or words not in changes.values()]


def _facts(scene: Scene, text: str) -> Iterator[_Fact]:
    named = {mention.kind for mention in parse(text).mentions}
    absent = tuple(kind for kind in KINDS if kind not in scene.kinds and kind not in named)
    for found in _SENTENCE.finditer(text):
        sentence, reading = found[0], parse(found[0])
        for fact in (
            *_of_things(scene, sentence, reading, absent),
            *_of_relations(scene, sentence, reading),
            *_of_place(scene, sentence, reading),
        ):
            yield replace(fact, start=fact.start + found.start())


def _of_things(scene: Scene, sentence: str, reading: Reading, absent: tuple[str, ...]) -> Iterator[_Fact]:
    kinds = [mention.kind for mention in reading.mentions]
    for mention in reading.mentions:
        begin, end = mention.span
        beside = next((kind for kind in kinds if kind != mention.kind), mention.kind)
        yield _Fact("kind", begin, sentence[begin:end], absent, partner(beside))
        thing = scene.find(mention.kind)
        for name, said, options in (
            ("colour", mention.colour, COLOURS),
            ("size", mention.size, SIZES),
        ):
            if said is not None:
                # The last one before the kind; in `The cup is red` it comes after.
                at = sentence.lower().rfind(said, 0, begin)
                at = at if at >= 0 else sentence.lower().index(said, end)
                yield _fact("attribute", at, said, options, thing and getattr(thing, name))


def _of_relations(scene: Scene, sentence: str, reading: Reading) -> Iterator[_Fact]:
    for claim in reading.relations:
        first, second = reading.mentions[claim.first], reading.mentions[claim.second]
        one, other = scene.find(first.kind), scene.find(second.kind)
        at = sentence.lower().index(claim.relation, first.span[1], second.span[0])
        true = relation(one, other) if one and other else None
        yield _fact("relation", at, claim.relation, RELATIONS.values(), true)


def _of_place(scene: Scene, sentence: str, reading: Reading) -> Iterator[_Fact]:
    """The words for where it is, preposition included; both things of a sentence share them."""
    mention = next((mention for mention in reading.mentions if mention.where), None)
    if mention is None:
        return
    found = re.search(rf"\b(on|at|in) the {mention.where}\b", sentence, re.IGNORECASE)
    if found is None:
        return
    thing = scene.find(mention.kind)
    places = [with_preposition(words) for words in PLACES[scene.rows, scene.columns]]
    if found[0][0].isupper():
        places = [words[0].upper() + words[1:] for words in places]
    true = places[PLACES[scene.rows, scene.columns].index(place(scene, thing))] if thing else None
    yield _fact("place", found.start(), found[0], places, true)


def _fact(sort: str, start: int, said: str, options: Iterable[str], true: str | None) -> _Fact:
    return _Fact(sort, start, said, tuple(words for words in options if words not in (said, true)))


def _articles(text: str) -> str:
    """`a` before a consonant, `an` before a vowel."""
    return re.sub(r"\b([Aa])n?(?= (\w))", lambda m: m[1] + "n" * (m[2].lower() in "aeiou"), text)


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
