"""The language about scenes: one grammar table from which texts are generated and parsed.

`parse` recovers exactly the contents of every text that `caption` generates, so a model's caption can be
checked against the scene.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from mllm_align.testbed.scenes.world import COLOURS, KINDS, SIZES, Scene, Thing

# Slots: {a}, {b} noun phrases, {relation} of a to b, {where}; {kind}, {colour}, {size} of a;
# {absent} a kind that is denied.
GRAMMAR = {
    "pair": (
        "{where}, {a} is {relation} {b}.",
        "{where}, there is {a} {relation} {b}.",
        "{where} is {a} {relation} {b}.",
        "{where}, we see {a} {relation} {b}.",
    ),
    "single": (
        "{where}, there is {a}.",
        "{where} is {a}.",
        "{where}, we see {a}.",
        "There is {a} {where}.",
    ),
    "pattern": ("There is {a}, again and again.", "We see {a}, again and again."),
    "pair_here": ("There is {a} {relation} {b}.", "{a} is {relation} {b}.", "We see {a} {relation} {b}."),
    "single_here": ("There is {a}.", "We see {a}."),
    "colour": ("The {kind} is {colour}.",),
    "size": ("The {kind} is {size}.",),
    "place": ("The {kind} is {where}.",),
    "yes": ("Yes, there is {a}.", "Yes, we see {a}."),
    "no": ("No, there is no {absent}.", "No, we see no {absent}."),
    "empty": ("There is nothing.", "Nothing is there."),
    "closing": ("Nothing else is there.", "There is nothing else.", "We see nothing else."),
}
QUESTIONS = {
    "caption": (
        "Describe the picture.",
        "What is in the picture?",
        "What do you see?",
        "Describe what you see.",
        "Tell me what the picture shows.",
        "Give a description of the picture.",
    ),
    "presence": (
        "Is there {a} in the picture?",
        "Is there {a}?",
        "Do you see {a}?",
        "Does the picture show {a}?",
    ),
    "what_where": ("What is {where}?", "What do you see {where}?", "Describe what is {where}."),
    "colour": ("What colour is the {kind}?", "Which colour does the {kind} have?"),
    "size": ("What size is the {kind}?", "Is the {kind} small or large?"),
    "place": ("Where is the {kind}?", "Where do you see the {kind}?"),
}
# (rows, columns) from the first thing to the second -> relation of the first to the second.
RELATIONS = {(0, 1): "left of", (0, -1): "right of", (1, 0): "above", (-1, 0): "below"}
# The words for each region of a grid, in raster order.
PLACES = {
    (1, 2): ("left", "right"),
    (2, 1): ("top", "bottom"),
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
}
SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_CLOSING = 0.25  # probability that a caption ends with a sentence without things
_EMPTY = 0.2  # probability that a question is about an empty region, if there is one


@dataclass(frozen=True)
class QA:
    """A question with its true answer; `kind` is a key of QUESTIONS."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Mention:
    """A thing that a text says is present, with the claims about it (None: no claim).

    span: [start, stop) of the kind's word in the text. sentence: its index in the text.
    """

    kind: str
    colour: str | None
    size: str | None
    where: str | None
    span: tuple[int, int]
    sentence: int


@dataclass(frozen=True)
class Relation:
    """The claim that mention `first` has a relation, such as above, to mention `second` (indices)."""

    first: int
    relation: str
    second: int


@dataclass(frozen=True)
class Reading:
    """The claims of a text. unparsed: the sentences outside the grammar, verbatim."""

    mentions: tuple[Mention, ...]
    relations: tuple[Relation, ...]
    sentences: int
    unparsed: tuple[str, ...]


# --- writing ------------------------------------------------------------------------------------


def place(scene: Scene, thing: Thing) -> str:
    """Return the words for the region of the thing, such as `top left`."""
    row, column = scene.region_of(thing)
    return PLACES[scene.rows, scene.columns][row * scene.columns + column]


def relation(first: Thing, second: Thing) -> str | None:
    """Return the relation of the first thing to the second; None unless they share a row or a column."""
    step = (int(np.sign(second.row - first.row)), int(np.sign(second.column - first.column)))
    return RELATIONS.get(step)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a true and complete caption: one sentence per group, in raster order."""
    if scene.repeats:
        return _write(GRAMMAR["pattern"], rng, a=_phrase(scene.things[0], rng))
    sentences = [_group(scene, group, rng, here=False) for group in scene.groups]
    if rng.random() < _CLOSING:
        sentences.append(_write(GRAMMAR["closing"], rng))
    return " ".join(sentences)


def describe_questions() -> tuple[str, ...]:
    """Return the prompts that ask for a caption."""
    return QUESTIONS["caption"]


def presence(scene: Scene, kind: str, rng: np.random.Generator) -> QA:
    """Ask whether a thing of this kind is in the picture; the answer begins with Yes or No."""
    thing = scene.find(kind)
    if thing is None:
        answer = _write(GRAMMAR["no"], rng, absent=kind)
    else:
        answer = _write(GRAMMAR["yes"], rng, a=_phrase(thing, rng))
    return QA(_write(QUESTIONS["presence"], rng, a=_article(kind)), answer, "presence")


def what_where(scene: Scene, rng: np.random.Generator) -> QA:
    """Ask what is in a region, sometimes an empty one; not for a picture that repeats one thing."""
    taken = {place(scene, group[0]): group for group in scene.groups}
    empty = [words for words in PLACES[scene.rows, scene.columns] if words not in taken]
    ask_empty = bool(empty) and rng.random() < _EMPTY
    words = _pick(empty if ask_empty else list(taken), rng)
    question = _write(QUESTIONS["what_where"], rng, where=with_preposition(words))
    answer = _write(GRAMMAR["empty"], rng) if ask_empty else _group(scene, taken[words], rng, here=True)
    return QA(question, answer, "what_where")


def attribute(scene: Scene, kind: str, rng: np.random.Generator) -> QA:
    """Ask for the `colour`, `size` or `place` of one of the scene's things."""
    thing = scene.things[rng.integers(len(scene.things))]
    slots = {"kind": thing.kind, "colour": thing.colour, "size": thing.size}
    slots["where"] = with_preposition(place(scene, thing))
    return QA(_write(QUESTIONS[kind], rng, **slots), _write(GRAMMAR[kind], rng, **slots), kind)


def training_rows(scene: Scene, rng: np.random.Generator, questions: int = 2) -> list[QA]:
    """Return a caption and `questions` other questions, half of them about presence.

    Half of the questions about presence are about a present thing. A picture that repeats one thing only
    gets questions about presence, because its places are indistinguishable.
    """
    rows = [QA(_pick(QUESTIONS["caption"], rng), caption(scene, rng), "caption")]
    for _ in range(questions):
        if scene.repeats or rng.random() < 0.5:
            present = rng.random() < 0.5
            kinds = [kind for kind in KINDS if (kind in scene.kinds) == present]
            rows.append(presence(scene, _pick(kinds, rng), rng))
        elif rng.random() < 0.5:
            rows.append(what_where(scene, rng))
        else:
            rows.append(attribute(scene, _pick(("colour", "size", "place"), rng), rng))
    return rows


def _group(scene: Scene, group: tuple[Thing, ...], rng: np.random.Generator, *, here: bool) -> str:
    """Return the sentence about a group; `here`: without its place."""
    things = list({thing.kind: thing for thing in reversed(group)}.values())[::-1]  # the first of each kind
    phrases = [_phrase(thing, rng) for thing in things]
    table = GRAMMAR[("pair" if len(things) == 2 else "single") + ("_here" if here else "")]
    slots = {"a": phrases[0], "where": with_preposition(place(scene, things[0]))}
    if len(things) == 2:
        slots |= {"b": phrases[1], "relation": relation(*things) or ""}
    return _write(table, rng, **slots)


def _phrase(thing: Thing, rng: np.random.Generator) -> str:
    size = f"{thing.size} " if rng.random() < 0.5 else ""
    return _article(f"{size}{thing.colour} {thing.kind}")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def with_preposition(words: str) -> str:
    """`left` -> `on the left`; `top left` -> `at the top left`."""
    preposition = {"left": "on", "right": "on"}.get(words, "at")
    return f"{preposition} the {words}"


def _write(templates: Sequence[str], rng: np.random.Generator, **slots: str) -> str:
    text = _pick(templates, rng).format(**slots)
    return text[0].upper() + text[1:]


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


# --- reading ------------------------------------------------------------------------------------


def parse(text: str) -> Reading:
    """Return the claims of any text, ignoring case and spacing.

    In a sentence outside the grammar, known things are still found, with a colour and size directly before
    them; it yields no claims of place or relation. `There is no cup` mentions nothing.
    """
    mentions: list[Mention] = []
    relations: list[Relation] = []
    sentences = [m for m in SENTENCE.finditer(text) if re.search(r"\w", m[0])]
    unparsed = []
    for index, sentence in enumerate(sentences):
        start = sentence.start() + len(sentence[0]) - len(sentence[0].lstrip())
        words = sentence[0].strip()
        match = next((m for m in (r.fullmatch(words) for r in _sentences()) if m), None)
        found = [_mention(m, "a", start, index) for m in _noun().finditer(words)] if match is None else []
        if match is None:
            unparsed.append(words)
        elif "a_kind" in match.re.groupindex:
            found.append(_mention(match, "a", start, index))
        if match is not None and "b_kind" in match.re.groupindex:
            found.append(_mention(match, "b", start, index))
            relations.append(Relation(len(mentions), _plain(match["relation"]), len(mentions) + 1))
        mentions += found
    return Reading(tuple(mentions), tuple(relations), len(sentences), tuple(unparsed))


def yes_or_no(text: str) -> bool | None:
    """Return True for an answer that begins with yes, False for no, None for anything else."""
    match = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return match and match[1].lower() == "yes"


def _mention(match: re.Match, name: str, start: int, sentence: int) -> Mention:
    def claim(slot: str) -> str | None:
        value = match[slot] if slot in match.re.groupindex else None
        return value and _plain(value)

    first, last = match.span(f"{name}_kind")
    return Mention(
        kind=_plain(match[f"{name}_kind"]),
        colour=claim(f"{name}_colour"),
        size=claim(f"{name}_size"),
        where=claim("where"),
        span=(start + first, start + last),
        sentence=sentence,
    )


def _plain(words: str) -> str:
    return " ".join(words.lower().split())


def _any(words: Sequence[str]) -> str:
    """A pattern for any of these words, the longest first."""
    ordered = sorted(words, key=len, reverse=True)
    return "|".join(word.replace(" ", r"\s+") for word in ordered)


@cache
def _noun() -> re.Pattern:
    """Return the pattern of a known thing anywhere in a text."""
    return re.compile(rf"\b{_thing('a')}s?\b", re.IGNORECASE)


def _thing(name: str) -> str:
    size, colour, kind = _any(SIZES), _any(tuple(COLOURS)), _any(KINDS)
    size = rf"(?:(?P<{name}_size>{size})\s+)?"
    return rf"{size}(?:(?P<{name}_colour>{colour})\s+)?(?P<{name}_kind>{kind})"


@cache
def _sentences() -> tuple[re.Pattern, ...]:
    """Return the pattern of every template of the grammar."""
    where = _any(sorted({words for grid in PLACES.values() for words in grid}))
    slots = {
        "a": rf"(?:an?|the|one)\s+{_thing('a')}",
        "b": rf"(?:an?|the|one)\s+{_thing('b')}",
        "relation": rf"(?:to\s+the\s+)?(?P<relation>{_any(tuple(RELATIONS.values()))})",
        "where": rf"(?:on|at|in)\s+the\s+(?P<where>{where})",
        "kind": rf"(?P<a_kind>{_any(KINDS)})",
        "colour": rf"(?P<a_colour>{_any(tuple(COLOURS))})",
        "size": rf"(?P<a_size>{_any(SIZES)})",
        "absent": rf"(?:{_any(KINDS)})",
    }
    patterns = []
    for template in (template for table in GRAMMAR.values() for template in table):
        words = re.sub(r"^(Yes|No), |\.$", "", template)
        # A model may append the place to a sentence whose template has none.
        words += "( {where})?" if "{a}" in words and "{where}" not in words else ""
        pattern = words.replace(",", r"\s*,?").replace(" ", r"\s+").format(**slots)
        patterns.append(re.compile(rf"(?:(?:yes|no)\b\s*,?\s*)?{pattern}\s*[.!]*", re.IGNORECASE))
    return tuple(patterns)
