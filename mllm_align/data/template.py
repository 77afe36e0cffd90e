"""Chat templates: programs of others, run with care."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import Environment, TemplateError

SECONDS = 10.0  # a rendering takes some microseconds
CHARACTERS = 1 << 22


class _TimeIsUp(BaseException):
    """No Exception, which Jinja and templates' filters would catch."""


class ChatTemplate:
    """A Jinja chat template; names: what it may use beside the messages, as bos_token."""

    def __init__(self, source: str, names: dict[str, Any]):
        self._source, self._names = source, names
        self._power = _raises_to_a_power(source)

    def __call__(self, chat: list[dict[str, Any]], ask: bool) -> str:
        """The conversation as text, as transformers renders it; ask: open the assistant's turn.

        Raises ValueError, whatever the template does: for what it raises itself, for work without an end
        (in the main thread only), for a text of more than CHARACTERS.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._power:
            raise ValueError("it raises to a power, which may take for ever")
        try:
            with _at_most(SECONDS):
                (text,), _ = render_jinja_template(
                    [chat], chat_template=self._source, add_generation_prompt=ask, **self._names
                )
        except _TimeIsUp:
            raise ValueError(f"it takes longer than {SECONDS:g} seconds") from None
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise ValueError(str(error) or type(error).__name__) from error
        if len(text) > CHARACTERS:
            raise ValueError(f"it writes {len(text)} characters, the limit is {CHARACTERS}")
        return text


def _raises_to_a_power(source: str) -> bool:
    """Whether a `**` other than that of keyword arguments is in it: no signal ends 9**9**9 once begun."""
    try:
        tokens = [(kind, text) for _, kind, text in Environment().lex(source) if kind != "whitespace"]
    except TemplateError:  # rendering tells
        return False
    before = [("", ""), *tokens]
    return any(
        token == ("operator", "**") and last not in (("operator", "("), ("operator", ","))
        for last, token in zip(before, tokens, strict=False)
    )


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TimeIsUp in the block after so long. In the main thread alone: signals reach no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise _TimeIsUp

    handler = signal.signal(signal.SIGALRM, end)
    others = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, should something swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if others[0]:
            signal.setitimer(signal.ITIMER_REAL, *others)
