"""What a value that a model folder gives may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mllm_align.errors import InputError, one_line, refusal


class Range(Protocol):
    """`value in range`, and what belongs there in words."""

    def __contains__(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Whole:
    low: int
    high: int

    def __contains__(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Between:
    """A number strictly between the two; NaN and infinity are not."""

    low: float
    high: float

    def __contains__(self, value: Any) -> bool:
        return type(value) in (int, float) and self.low < value < self.high

    def __str__(self) -> str:
        return f"a number above {self.low:g} and below {self.high:g}"


@dataclass(frozen=True)
class OneOf:
    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return any(type(value) is type(each) and value == each for each in self.values)

    def __str__(self) -> str:
        return " or ".join("null" if each is None else repr(each) for each in self.values)


@dataclass(frozen=True)
class Listed:
    """A list of so many values, each in one range."""

    count: Whole
    each: Range

    def __contains__(self, value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) in self.count
            and all(each in self.each for each in value)
        )

    def __str__(self) -> str:
        few = self.count.low if self.count.low == self.count.high else f"{self.count.low} or more"
        return f"a list of {few}, each {self.each}"


@dataclass(frozen=True)
class Object:
    def __contains__(self, value: Any) -> bool:
        return isinstance(value, dict)

    def __str__(self) -> str:
        return "an object"


@dataclass(frozen=True)
class Maybe:
    """null, or a value of the range."""

    some: Range

    def __contains__(self, value: Any) -> bool:
        return value is None or value in self.some

    def __str__(self) -> str:
        return f"null or {self.some}"


@dataclass(frozen=True)
class Text:
    longest: int = 1000

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, str) and len(value) <= self.longest

    def __str__(self) -> str:
        return "a text"


FLAG = OneOf((True, False))
WIDTH, DEPTH, HEADS = Whole(1, 1 << 24), Whole(1, 1024), Whole(1, 1 << 14)
PIXELS = Whole(1, 4096)
COLOURS = Whole(3, 3)
EPS = Between(1e-20, 0.1)  # float32 has smaller numbers, but no use for their roots


def check(at: str, name: str, value: Any, allowed: Range, remedy: str) -> Any:
    """The value. Raises InputError where it is out of range."""
    if value not in allowed:
        raise wrong(at, name, value, str(allowed), remedy)
    return value


def wrong(at: str, name: str, value: Any, wanted: str, remedy: str) -> InputError:
    found = one_line(repr(value), 80)
    return refusal(at, f"{name} is {found}, wanted {wanted}", remedy)


def check_token(at: str, whole: Mapping[str, Any], name: str, vocab: int, remedy: str) -> None:
    """Raises InputError for a token's id that is not within the vocabulary."""
    if whole[name] >= vocab:
        raise wrong(at, name, whole[name], f"an id within the vocabulary of {vocab}", remedy)


def fields(
    at: str, raw: Mapping[str, Any], table: Mapping[str, tuple[Any, Range]], remedy: str, under: str = ""
) -> dict[str, Any]:
    """Every field of a table: as `raw` has it, or its default.

    table: name -> (default, range). Raises InputError for the first that is out of range.
    """
    return {
        name: check(at, under + name, raw.get(name, default), allowed, remedy)
        for name, (default, allowed) in table.items()
    }
