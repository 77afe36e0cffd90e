"""What every config checks of itself."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mllm_align.errors import InputError, one_line

MANY = 2**16  # rows of a batch, tokens, threads: what no machine takes more of
STEPS = 10**9  # counters are of 32 bits
SEED = 2**63 - 1  # what random generators take
DAY = 24 * 60 * 60  # seconds


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {_shown(value)}; it must be {wanted}")


def within(config: Any, prefix: str, low: float, high: float, *names: str) -> None:
    """Refuse a field, unless it is None, that is below `low` or above `high`, or no number."""
    for name in names:
        check_number(prefix + name, getattr(config, name), low, high)


def check_number(name: str, value: float | None, low: float, high: float) -> None:
    """Raises InputError for a number outside; None is none."""
    wanted = f"{low} or more" if value is not None and value < low else f"from {low} to {high}"
    require(value is None or low <= value <= high, name, value, wanted)


def _shown(value: Any) -> str:
    try:
        return one_line(repr(value), 200)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


def check_types(config: Any, prefix: str = "") -> None:
    """Python takes any value for a field; a config file's mistake shall show here, not steps later."""
    hints = get_type_hints(type(config))
    for each in dataclasses.fields(config):
        kind = hints[each.name]
        choices = get_origin(kind) is Literal
        wanted = (
            f"one of {', '.join(get_args(kind))}"
            if choices
            else f"of type {getattr(each.type, '__name__', each.type)}"
        )
        value = getattr(config, each.name)
        require(_fits(value, kind), prefix + each.name, value, wanted)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)
