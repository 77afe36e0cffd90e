"""Weighted sums of objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm_align.align.absolute import BCO
from mllm_align.align.checks import check_objective
from mllm_align.align.contract import OBJECTIVES, Objective, Scalar, Signals, Terms
from mllm_align.align.pairwise import DPO
from mllm_align.align.sft import SFT
from mllm_align.batch import Responses
from mllm_align.errors import InputError, quoted
from mllm_align.registry import made, registered_name


@dataclass(frozen=True)
class Part:
    """An objective of a sum. weight: what its loss is multiplied by."""

    objective: Objective
    weight: float = 1.0

    def __post_init__(self):
        weight = self.weight
        good = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (good and math.isfinite(weight) and weight > 0):
            raise InputError(f"the weight of {self.name} is {quoted(weight)}; it must be a number above 0")

    @property
    def name(self) -> str:
        """What it is called in a sum: as on the command line, or a user's class by its own name."""
        kind = type(self.objective)
        return registered_name(kind) or kind.__name__


@OBJECTIVES.register("sum")
@dataclass(frozen=True)
class Sum(Objective):
    """sum over parts of weight times loss; by default MPO (Wang et al. 2024, arXiv 2411.10442).

    All parts see the same groups, and each as many responses as it compares: an objective of one response
    sees the chosen one. A term is named like its part, and where a part has several, PART/TERM. Metrics of
    the first part keep their names; those of the others begin with their part's.
    """

    parts: tuple[Part, ...] = (Part(DPO(), 0.8), Part(BCO(), 0.2), Part(SFT(), 1.0))

    def __post_init__(self):
        if not (isinstance(self.parts, tuple) and self.parts):
            raise InputError(f"objective.parts is {quoted(self.parts)}; it must be a tuple of parts")
        for part in self.parts:
            if not (isinstance(part, Part) and isinstance(part.objective, Objective)):
                raise InputError(f"objective.parts has {quoted(part)}; it must be Part(objective, weight)")
            check_objective(part.objective)
            if isinstance(part.objective, Sum) or part.objective.needs - {"reference"}:
                wanted = "one on log-probabilities of the data's responses"
                raise InputError(f"{part.name} can't be part of a sum; take {wanted}")
        names = [part.name for part in self.parts]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{name} is in a sum twice; give it once")
        several = {part.name: part.objective.of_record for part in self.parts}
        told = [f"{name} {count}" for name, count in several.items() if count > 1]
        if len(set(several.values()) - {1}) > 1:
            problem = f"parts of a sum compare different numbers of responses ({', '.join(told)})"
            raise InputError(f"{problem}; take those of one number")
        images = {part.name: part.objective.rejected_image for part in self.parts}
        told = [f"{name} {image}" for name, image in images.items() if image]
        if len(set(images.values()) - {None}) > 1:
            problem = f"parts of a sum have different rejected images ({', '.join(told)})"
            raise InputError(f"{problem}; give all of them one rejected_image")

    @property
    def responses(self) -> int:  # type: ignore[override]
        return self.borrowed + max(part.objective.of_record for part in self.parts)

    @property
    def borrowed(self) -> int:  # type: ignore[override]
        return max(part.objective.borrowed for part in self.parts)

    @property
    def made(self) -> int:  # type: ignore[override]
        return max(part.objective.made for part in self.parts)

    @property
    def unpaired(self) -> bool:  # type: ignore[override]
        return all(part.objective.unpaired for part in self.parts)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(part.objective.needs for part in self.parts))

    @property
    def rejected_image(self) -> str | None:  # type: ignore[override]
        return next((i for part in self.parts if (i := part.objective.rejected_image)), None)

    @property
    def held_out(self) -> Objective:
        each = tuple(Part(part.objective.held_out, part.weight) for part in self.parts)
        return self if each == self.parts else Sum(each)

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        found: dict[str, Scalar] = {}
        for part in self.parts:
            count = tuple(range(part.objective.responses))
            found |= _terms(part, part.objective.weights(responses.take(count)))
        return found

    def init_state(self) -> Any:
        return {part.name: part.objective.init_state() for part in self.parts if _has_state(part)}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        sums: dict[str, Scalar] = {}
        metrics: dict[str, Any] = {}
        stats: dict[str, Any] = {}
        for part in self.parts:
            own = state[part.name] if _has_state(part) else ()
            made = part.objective(signals.of(part.objective), own)
            sums |= _terms(part, {name: part.weight * value for name, value in made.sums.items()})
            prefix = "" if part is self.parts[0] else f"{part.name}/"
            metrics |= {f"{prefix}{name}": value for name, value in made.metrics.items()}
            if _has_state(part):
                stats[part.name] = made.stats
        return Terms(sums, metrics, stats)

    def update(self, state: Any, stats: Any) -> Any:
        return {
            part.name: part.objective.update(state[part.name], stats[part.name])
            for part in self.parts
            if _has_state(part)
        }


def _has_state(part: Part) -> bool:
    return type(part.objective).init_state is not Objective.init_state


def _terms(part: Part, values: dict[str, Scalar]) -> dict[str, Scalar]:
    """A part's terms under their names in the sum."""
    if len(values) == 1:
        return {part.name: next(iter(values.values()))}
    return {f"{part.name}/{name}": value for name, value in values.items()}


# ---- as text ------------------------------------------------------------------------------------------


def says_sum(words: Sequence[str]) -> bool:
    """Whether words name a sum, as `dpo:0.8 sft` does, and not one objective."""
    return len(words) > 1 or any(_number(word.rpartition(":")[2]) is not None for word in words)


def weighted(words: Sequence[str], present: Objective | None = None) -> Sum:
    """The sum of words such as `dpo:0.8` or `file.py:Mine:0.5`; without a weight it is 1.

    present: an objective whose settings stay, of the kinds that it has. Raises InputError for words that
    name no objective, or no weight.
    """
    kept = {type(each): each for each in _objectives(present)}
    parts = []
    for word in words:
        name, _, weight = word.rpartition(":")
        value = _number(weight)
        if value is None and name in OBJECTIVES:
            problem = f"{quoted(weight)} in {quoted(word)} is no weight"
            raise InputError(f"{problem}; give NAME:WEIGHT with a number above 0, such as dpo:0.8")
        kind = OBJECTIVES.find(word if value is None else name)
        parts.append(Part(kept.get(kind) or made(kind), 1.0 if value is None else value))
    return Sum(tuple(parts))


def _objectives(of: Objective | None) -> list[Objective]:
    if isinstance(of, Sum):
        return [part.objective for part in of.parts]
    return [] if of is None else [of]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
