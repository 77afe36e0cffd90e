"""The one line in which bad input is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mllm_align.errors import InputError


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The message of the InputError that a call raises: one printable line, and not a long one."""
    with pytest.raises(InputError) as error:
        call(*args, **options)
    message = str(error.value)
    assert message.isprintable() and len(message) < 700
    return message


def assert_refusal(call: Callable[[], Any], *words: str) -> str:
    """The same, of a message that has all these words."""
    message = refusal(call)
    for word in words:
        assert word in message, message
    return message
