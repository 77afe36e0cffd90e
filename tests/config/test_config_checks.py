"""What every config checks of itself: types, ranges, and numbers of every size."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from refusals import refusal

from mllm_align import config as module
from mllm_align.config import OBJECTIVES, from_json, to_json
from mllm_align.config.checks import check_number, check_types, require, within
from mllm_align.errors import InputError
from mllm_align.files import parse_json

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Nested:
    size: int = 1


@dataclass(frozen=True)
class Every:
    count: int = 1
    rate: float = 0.5
    name: str = "a"
    flag: bool = True
    kind: Literal["one", "two"] = "one"
    place: Path | None = None
    some: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1,)
    inner: Nested = Nested()
    either: Nested | int | None = None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"count": -3, "rate": 2, "flag": False, "kind": "two"},
        {"rate": NAN, "place": Path("x"), "some": ("a", "b"), "sizes": ()},
        {"either": 3},
        {"either": Nested(2)},
    ],
)
def test_values_of_the_right_types_pass(fields):
    check_types(Every(**fields))


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("count", 1.0, "every.count is 1.0; it must be of type int"),
        ("count", True, "every.count is True; it must be of type int"),
        ("count", None, "every.count is None; it must be of type int"),
        ("count", np.int64(3), "every.count is np.int64(3); it must be of type int"),
        ("rate", "0.5", "every.rate is '0.5'; it must be of type float"),
        ("rate", False, "every.rate is False; it must be of type float"),
        ("name", 1, "every.name is 1; it must be of type str"),
        ("flag", 1, "every.flag is 1; it must be of type bool"),
        ("kind", "three", "every.kind is 'three'; it must be one of one, two"),
        ("kind", 1, "every.kind is 1; it must be one of one, two"),
        ("kind", ["one"], "every.kind is ['one']; it must be one of one, two"),
        ("place", "x", "every.place is 'x'; it must be of type"),
        ("some", ["a"], "every.some is ['a']; it must be of type tuple"),
        ("some", ("a", 1), "every.some is ('a', 1); it must be of type tuple"),
        ("sizes", (1, True), "every.sizes is (1, True); it must be of type tuple"),
        ("inner", {"size": 1}, "every.inner is {'size': 1}; it must be of type"),
        ("either", "x", "every.either is 'x'; it must be of type"),
    ],
)
def test_values_of_other_types_are_refused(field, value, said):
    assert refusal(check_types, Every(**{field: value}), "every.").startswith(said)


@pytest.mark.parametrize(
    "value, said",
    [
        (None, None),
        (2, None),
        (5.5, None),
        (1.99, "n is 1.99; it must be 2 or more"),
        (-INF, "n is -inf; it must be 2 or more"),
        (5.6, "n is 5.6; it must be from 2 to 5.5"),
        (INF, "n is inf; it must be from 2 to 5.5"),
        (NAN, "n is nan; it must be from 2 to 5.5"),
        (10**5000, "n is a number of thousands of digits; it must be from 2 to 5.5"),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,
)
def test_both_ends_of_a_range_are_in_it(value, said):
    if said is None:
        check_number("n", value, 2, 5.5)
    else:
        assert refusal(check_number, "n", value, 2, 5.5) == said


def test_several_fields_of_one_range():
    within(Every(), "every.", 0, 1, "count", "rate", "place")
    assert refusal(within, Every(rate=2), "every.", 0, 1, "count", "rate") == (
        "every.rate is 2; it must be from 0 to 1"
    )


def test_a_value_is_shown_short_and_in_one_line():
    assert refusal(require, False, "x", "a\nb", "short") == "x is 'a\\nb'; it must be short"
    assert len(refusal(require, False, "x", "y" * 5000, "short")) < 250
    require(True, "x", "y", "short")


# ---- every config ------------------------------------------------------------------------------------

CONFIGS = [value for value in vars(module).values() if dataclasses.is_dataclass(value)]
CONFIGS += [*OBJECTIVES.values()]
HUGE = [2**31, 2**63, 2**70, 10**12, 10**18, 10**400, 10**5000, 1e18, 1e308, float("inf")]
EXTREMES = [*HUGE, *(-value for value in HUGE), 0, 0.0, 5e-324, float("nan"), True, None, "1", 1 + 1j]
EXTREMES += [
    np.float64(1e300),
    np.float64(0.5),
    np.float32(0.5),
    np.int64(3),
    np.array(3),
    np.array([1, 2]),
]


def numbers(config):
    """(its name, its type) of each field that may be a number."""
    for each in dataclasses.fields(config):
        if (
            isinstance(getattr(config(), each.name), int | float)
            or "int" in each.type
            or "float" in each.type
        ):
            yield each.name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_number_has_two_ends(config):
    """Whatever is given: refused in one line, or a config that goes to JSON and back."""
    for name in numbers(config):
        taken = []
        for value in EXTREMES:
            try:
                made = config(**{name: value})
            except InputError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
                continue
            values = parse_json(json.dumps(to_json(made)))
            values.pop("kind", None)
            assert from_json(values, config) == made
            taken.append(value)
        assert not [v for v in taken if v is not None and abs(v) > 2**63 - 1], f"{name} takes {taken}"
