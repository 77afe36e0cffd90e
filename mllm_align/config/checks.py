"""What every config checks of itself."""

from __future__ import annotations

import dataclasses
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mllm_align.errors import InputError


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}; it must be {wanted}")


def check_types(config: Any, prefix: str = "") -> None:
    """Python takes any value for a field; a config file's mistake shall show here, not steps later."""
    hints = get_type_hints(type(config))
    for each in dataclasses.fields(config):
        kind = hints[each.name]
        choices = get_origin(kind) is Literal
        wanted = f"one of {', '.join(get_args(kind))}" if choices else f"of type {each.type}"
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
