"""Corrupted captions: the testbed's substitute for rejected responses written by a stronger model.

A few facts of the text are changed so that it stays plausible without the picture; all other words are
unchanged.
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
    """Words that make a claim, and false replacements (`others`).

    sort: kind, attribute, place or relation. usual: for a kind, the partner of the other thing in its
    sentence.
    """

    sort: str
    start: int
    words: str
    others: tuple[str, ...]
    usual: str | None = None


def corrupt(
    scene: Scene, text: str, rng: np.random.Generator, max_changes: int = 3, min_changes: int = 1
) -> str:
    """Return the text with `min_changes` to `max_changes` facts changed: kinds, colours or sizes, places,
    relations. Fewer are changed where the text has fewer.

    Every sort of fact is equally likely. Half of the changed kinds become the usual partner of the other
    thing of the sentence, or their own partner if there is no other thing, unless it is in the picture; the
    rest become any kind that is neither in the picture nor mentioned. Every changed fact is false. Raises
    ValueError for a text without claims.
    """
    facts = [fact for fact in _facts(scene, text) if fact.others]
    if not facts:
        raise ValueError(f"claims nothing that could be changed: {text!r}")
    changes: dict[_Fact, str] = {}
    for _ in range(int(rng.integers(min_changes, max_changes + 1))):
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
    """The replacements still available: no kind is used twice."""
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
        for name, words, options in (
            ("colour", mention.colour, COLOURS),
            ("size", mention.size, SIZES),
        ):
            if words is not None:
                # The last occurrence before the kind; in `The cup is red` it comes after the kind.
                at = sentence.lower().rfind(words, 0, begin)
                at = at if at >= 0 else sentence.lower().index(words, end)
                yield _fact("attribute", at, words, options, thing and getattr(thing, name))


def _of_relations(scene: Scene, sentence: str, reading: Reading) -> Iterator[_Fact]:
    for claim in reading.relations:
        first, second = reading.mentions[claim.first], reading.mentions[claim.second]
        one, other = scene.find(first.kind), scene.find(second.kind)
        at = sentence.lower().index(claim.relation, first.span[1], second.span[0])
        true = relation(one, other) if one and other else None
        yield _fact("relation", at, claim.relation, RELATIONS.values(), true)


def _of_place(scene: Scene, sentence: str, reading: Reading) -> Iterator[_Fact]:
    """The words for the place, with the preposition; both things of a sentence share them."""
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


def _fact(sort: str, start: int, words: str, options: Iterable[str], true: str | None) -> _Fact:
    return _Fact(sort, start, words, tuple(each for each in options if each not in (words, true)))


def _articles(text: str) -> str:
    """`a` before a consonant, `an` before a vowel."""
    return re.sub(r"\b([Aa])n?(?= (\w))", lambda m: m[1] + "n" * (m[2].lower() in "aeiou"), text)


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
