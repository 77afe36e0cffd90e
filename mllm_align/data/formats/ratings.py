"""Sets with several rated responses in each row, of which pairs are made."""

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import combinations
from typing import Any

from mllm_align.config.parts import READERS
from mllm_align.data.files import Row
from mllm_align.data.formats.base import Reader, Taking, answered, image, numbered, published, type_name
from mllm_align.data.records import check_object, check_text
from mllm_align.errors import refusal

_HIGHEST = 1000.0  # no rating is beyond


@READERS.register("vlfeedback")
class VLFeedback(Reader):
    """VLFeedback: one prompt, several responses with ratings, of which pairs are made.

    A pair says of both responses which model wrote them (`chosen_model`, `rejected_model`), their scores
    (`chosen_rating`, ...) and why (`chosen_reason`, ...).
    """

    takes = frozenset(("completions", "img_path"))

    def fits(self, row: Mapping) -> bool:
        return "completions" in row and not answered(row)

    def __call__(self, row: Row, number: int, taking: Taking) -> list[dict]:
        prompt = check_text(row.value.get("prompt"), f"{row.at}, prompt")
        rated = []
        for i, completion in enumerate(
            _completions(row.value.get("completions"), f"{row.at}, completions")
        ):
            at = f"{row.at}, completions[{i}]"
            check_object(completion, at)
            rating = _rating(completion.get("annotations"))
            response = completion.get("response")
            if response is None or not check_text(response, f"{at}.response").strip():
                taking.dropped["empty response"] += 1
            elif rating is None:
                taking.dropped["response without a number for each rating"] += 1
            else:
                rated.append((rating, response, completion))
        if len(rated) < 2:
            taking.dropped["prompt with fewer than two rated responses"] += 1
            return []
        if taking.pairs == "best-worst":  # the first of equals
            pairs = [(max(rated, key=lambda each: each[0]), min(rated, key=lambda each: each[0]))]
        else:
            pairs = [sorted(pair, key=lambda each: -each[0]) for pair in combinations(rated, 2)]
        common = {
            "image": image(row, "image", "img_path"),
            "prompt": prompt,
            **published(row, "id", number),
        }
        plain = [
            {**common, **_side("chosen", *good), **_side("rejected", *bad)}
            for good, bad in pairs
            if good[0] > bad[0]
        ]
        taking.dropped["tie"] += len(pairs) - len(plain)
        return numbered(plain)


def _side(name: str, rating: Fraction, response: str, completion: Mapping) -> dict[str, Any]:
    """A response of a pair, and what its row says of it."""
    marks = completion["annotations"].items()
    reasons = (f"{aspect} {mark['Rating']}: {mark.get('Rationale')}" for aspect, mark in marks)
    about = {
        "model": completion.get("model"),
        "rating": round(float(rating), 3),
        "reason": "\n".join(reasons),
    }
    return {name: response} | {f"{name}_{field}": value for field, value in about.items()}


def _completions(value: Any, at: str) -> list[Any]:
    """A list of completions, or of each of their fields a list, as `datasets` stores it."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        counts = {len(each) for each in value.values() if isinstance(each, list | tuple)}
        if len(counts) != 1:
            raise refusal(at, "its fields are not lists of one length", "give a list of completions")
        return [_at(value, i) for i in range(counts.pop())]
    if not isinstance(value, list | tuple):
        raise refusal(at, f"found {type_name(value)}", "give a list of completions")
    return list(value)


def _at(value: Any, i: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _at(each, i) for name, each in value.items()}
    return value[i] if isinstance(value, list | tuple) and i < len(value) else None


def _rating(annotations: Any) -> Fraction | None:
    """The mean of a response's ratings, exactly, so that ties are ties; None unless each is a number."""
    if not isinstance(annotations, Mapping) or not annotations:
        return None
    ratings = [each.get("Rating") if isinstance(each, Mapping) else None for each in annotations.values()]
    numbers = [_number(rating) for rating in ratings]
    return sum(numbers) / Fraction(len(numbers)) if None not in numbers else None  # type: ignore[arg-type]


def _number(rating: Any) -> Fraction | None:
    if isinstance(rating, bool) or not isinstance(rating, str | int | float):
        return None
    try:
        value = float(rating)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(value) or abs(value) > _HIGHEST:
        return None
    return Fraction(value).limit_denominator(1000)  # 4.2 is 21/5
