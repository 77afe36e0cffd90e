"""Preferences that are stated in the prompt, to be followed at inference (MetaAlign, arXiv 2410.14184).

A row's field `preferences` has a text, or several, for each of three tiers:

    system     what the operator wants of every answer: the system turn
    user       what this user wants: before the question, in the first user turn
    dialogue   what this question asks for besides: after the question, in the last user turn

A model that learned from pairs whose preference flips (`mllm-align data flip`) goes by what is stated;
training and generation need no more than the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_align.data.records import Message, Part, Record, check_text
from mllm_align.errors import quoted, refusal
from mllm_align.files import parse_json

FIELD = "preferences"
TIERS = ("system", "user", "dialogue")


Preferences = tuple[tuple[str, str], ...]
"""(tier, text), in the order of TIERS."""


def conversation(record: Record) -> tuple[Message, ...]:
    """The record's messages with its preferences stated in them."""
    texts, messages = dict(record.preferences), list(record.messages)
    if text := texts.get("system"):
        own = messages.pop(0).text if messages[0].role == "system" else ""
        messages.insert(0, Message("system", (Part("\n".join(filter(None, (own.rstrip(), text)))),)))
    if text := texts.get("user"):
        first = next(i for i, message in enumerate(messages) if message.role == "user")
        messages[first] = _before(messages[first], f"{text}\n")
    if text := texts.get("dialogue"):
        messages[-1] = _after(messages[-1], text)
    return tuple(messages)


def parse_preferences(value: object, where: str) -> Preferences:
    """A row's preferences; several texts of a tier become lines.

    value: tier -> text or list of texts, as an object or as JSON text, which Parquet files have. Raises
    InputError for other tiers and other values.
    """
    at = f"{where}, {FIELD}"
    preferences = _opened(value, at)
    if preferences is None:
        return ()
    if not isinstance(preferences, Mapping):
        raise refusal(at, f"found {type(preferences).__name__}", "give an object such as {'user': '...'}")
    found = {}
    for tier, value in preferences.items():
        if tier not in TIERS:
            raise refusal(at, f"has the tier {quoted(tier)}", f"give one of {', '.join(TIERS)}")
        texts = [value] if isinstance(value, str) else value or ()  # in Arrow files, absent tiers are null
        if not isinstance(texts, list | tuple):
            raise refusal(f"{at}.{tier}", f"found {type(value).__name__}", "give a text or a list of texts")
        lines = [_line(text, f"{at}.{tier}") for text in texts]
        if lines:
            found[tier] = "\n".join(lines)
    return tuple((tier, found[tier]) for tier in TIERS if tier in found)


def _opened(value: object, at: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise refusal(at, "is a text", "give an object such as {'user': '...'}") from error


def _line(text: Any, at: str) -> str:
    if "<image>" in check_text(text, at):
        raise refusal(at, "<image> in a preference", "remove it")
    if not text.strip():
        raise refusal(at, "is empty", "give its text or leave it out")
    return text.strip()


def _before(message: Message, text: str) -> Message:
    """The text before the message's own, behind images that stand first."""
    content = message.content
    place = next((i for i, part in enumerate(content) if part.text is not None), len(content))
    return replace(message, content=(*content[:place], Part(text), *content[place:]))


def _after(message: Message, text: str) -> Message:
    *before, last = message.content
    if last.text is None:
        return replace(message, content=(*message.content, Part(text)))
    return replace(message, content=(*before, Part(f"{last.text.rstrip()} {text}")))
