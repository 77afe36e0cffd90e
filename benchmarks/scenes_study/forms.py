"""Answers about a scene in the forms that a preference asks for, and the wordings of each preference."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from mllm_align.testbed.scenes.language import caption, parse, place, with_preposition
from mllm_align.testbed.scenes.world import COLOURS, Scene

WORDINGS: Mapping[str, tuple[str, ...]] = {
    "brief": ("Be brief.", "Please be brief.", "Keep it short.", "A short answer.", "In one sentence."),
    "everything": (
        "Say everything.",
        "Please say all.",
        "Tell me everything.",
        "A full answer.",
        "Say it all.",
    ),
    "colours": ("Say the colours.", "Please name colours.", "Tell me the colours.", "I like colours."),
    "places": ("Say the places.", "Please name places.", "Tell me the places.", "I like places."),
}
UNSEEN: Mapping[str, tuple[str, ...]] = {
    "brief": ("Please keep it brief.", "Be short.", "A brief answer, please."),
    "everything": ("Please tell me all.", "Say all of it.", "A full answer, with everything."),
    "colours": ("Please say colours.", "Name the colours.", "I like the colours."),
    "places": ("Please say places.", "Name the places.", "I like the places."),
}
"""Not trained on: other wordings of the same words."""
FORMS = tuple(WORDINGS)


def answer(scene: Scene, form: str, rng: np.random.Generator) -> str:
    """A true answer in a form."""
    if form == "everything":
        return caption(scene, rng)
    if form == "brief":
        kind = scene.things[int(rng.integers(len(scene.things)))].kind
        return f"There is {'an' if kind[0] in 'aeiou' else 'a'} {kind}."
    if form == "colours":
        return " ".join(f"The {thing.kind} is {thing.colour}." for thing in scene.things)
    return " ".join(f"The {t.kind} is {with_preposition(place(scene, t))}." for t in scene.things)


def form_of(text: str) -> str | None:
    """The form of an answer; None for a mixture, and for what is outside the grammar."""
    sentences = [sentence.strip() for sentence in re.findall(r"[^.]+\.", text)]
    if not sentences or parse(text).unparsed:
        return None
    if all(re.fullmatch(rf"The [\w ]+ is ({'|'.join(COLOURS)})\.", each) for each in sentences):
        return "colours"
    if all(re.fullmatch(r"The [\w ]+ is (on|at|in) the [\w ]+\.", each) for each in sentences):
        return "places"
    if len(sentences) == 1:
        return "brief" if re.fullmatch(r"There is an? \w+\.", sentences[0]) else "everything"
    kinds = re.findall(r"^The [\w ]+ is", text, re.MULTILINE)
    return None if kinds else "everything"
