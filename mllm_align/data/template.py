"""Rendering of chat templates, which are untrusted programs: with limits on time and output."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import Environment, TemplateError

SECONDS = 10.0  # rendering usually takes microseconds
CHARACTERS = 1 << 22


class _Timeout(BaseException):
    """Not an Exception: Jinja and a template's filters would catch it."""


class ChatTemplate:
    """A Jinja chat template; names: variables available to it beside the messages, such as bos_token."""

    def __init__(self, source: str, names: dict[str, Any]):
        self._source, self._names = source, names
        self._power = _uses_power(source)

    def __call__(self, chat: list[dict[str, Any]], ask: bool) -> str:
        """The conversation as text, as transformers renders it; ask: add the generation prompt.

        Raises ValueError for any exception of the template, for rendering that takes longer than SECONDS
        (in the main thread only), and for a text of more than CHARACTERS.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._power:
            raise ValueError("it raises to a power (**), which may never end")
        try:
            with _at_most(SECONDS):
                (text,), _ = render_jinja_template(
                    [chat], chat_template=self._source, add_generation_prompt=ask, **self._names
                )
        except _Timeout:
            raise ValueError(f"it takes longer than {SECONDS:g} seconds") from None
        except Exception as error:  # a template may raise anything
            raise ValueError(str(error) or type(error).__name__) from error
        if len(text) > CHARACTERS:
            raise ValueError(f"it writes {len(text)} characters, the limit is {CHARACTERS}")
        return text


def _uses_power(source: str) -> bool:
    """Whether the template uses `**` other than for keyword arguments: no signal interrupts 9**9**9."""
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(source) if kind != "whitespace"]
    except TemplateError:  # rendering raises it again
        return False
    before = [("", ""), *tokens]
    return any(
        token == ("operator", "**") and last not in (("operator", "("), ("operator", ","))
        for last, token in zip(before, tokens, strict=False)
    )


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _Timeout in the block after `seconds`. In the main thread only: signals reach no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise _Timeout

    handler = signal.signal(signal.SIGALRM, end)
    others = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # repeated, in case the first is swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if others[0]:
            signal.setitimer(signal.ITIMER_REAL, *others)
