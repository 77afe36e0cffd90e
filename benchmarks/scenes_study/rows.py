"""Rows of the study and their metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.evaluation.intervals import Interval, bootstrap, over_seeds
from mllm_align.testbed.hallucination import FIGURES

Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]
"""Variant -> seed -> row."""

JUDGE = "self_judge"
REWARDS = {"reward_corrupted": "corrupted", "reward_bdhs": "bdhs", "reward_povid": "povid"}
"""Rows of reward models: the kind of rejected responses that each learns from."""
# What is added up for the figures that are not in FIGURES.
MORE = {
    "details": (
        ("attributes_wrong", "places_wrong", "relations_wrong"),
        ("attributes", "places", "relations"),
    )
}


def read_rows(results: Path) -> tuple[Rows, dict[int, Row], Rows]:
    """The rows of all variants, those of the self judge by seed, and those of the reward models."""
    rows: Rows = {}
    for file in sorted(results.glob("*.json")):
        row = json.loads(file.read_text(encoding="utf-8"))
        rows.setdefault(row["variant"], {})[row["seed"]] = row
    judges = rows.pop(JUDGE, {})
    rewards = {name: rows.pop(name) for name in REWARDS if name in rows}
    return rows, judges, rewards


def _parts(name: str) -> tuple[Sequence[str], Sequence[str]]:
    if name in MORE:
        return MORE[name]
    above, below = FIGURES[name]
    return (above,), (below,)


def unit(name: str) -> float:
    """What a figure is multiplied by to be shown: shares are told in percent."""
    return 1.0 if name in ("words", "visual_margin") else 100.0


def figure(row: Row, name: str, split: str = "broken") -> float:
    """A figure of FIGURES, `details` (wrong claims about things that are there), `pope` (accuracy), or of
    no split: `visual` (captions that are likelier under their picture than under an edited one) and
    `visual_margin` (by how many nats).

    nan where there is nothing to count.
    """
    if name in ("visual", "visual_margin"):
        found = row.get("visual", {"right": math.nan, "pairs": 1, "margin": math.nan})
        return found["margin"] if name == "visual_margin" else found["right"] / found["pairs"]
    found = row["splits"][split]
    if name == "pope":
        right, asked = np.array(list(found["pope"].values())).sum(0)
        return float(right / asked)
    above, below = (sum(found["counts"][n] for n in names) for names in _parts(name))
    return above / below if below else math.nan


def spread(each: dict[int, Row], name: str, split: str = "broken") -> Interval:
    """Mean and t interval over seeds."""
    return over_seeds([figure(row, name, split) for _, row in sorted(each.items())])


def difference(one: dict[int, Row], other: dict[int, Row], name: str, split: str = "broken") -> Interval:
    """One's figure less the other's, on the seeds that both have."""
    seeds = sorted(set(one) & set(other))
    return over_seeds([figure(one[s], name, split) - figure(other[s], name, split) for s in seeds])


def over_pictures(
    one: dict[int, Row], other: dict[int, Row], name: str, split: str = "broken"
) -> Interval | None:
    """The same difference with its bootstrap interval over pictures, the seeds' counts added up; None for
    figures whose counts of each picture are not kept."""
    seeds = sorted(set(one) & set(other))
    if not seeds or name not in FIGURES:
        return None
    columns = []
    for each in (one, other):
        for column in FIGURES[name]:
            kept = [each[s]["splits"][split]["each"].get(column) for s in seeds]
            if None in kept:
                return None
            columns.append(np.sum(kept, axis=0))
    return bootstrap(np.stack(columns, 1), lambda m: m[..., 0] / m[..., 1] - m[..., 2] / m[..., 3])


def useful(judge: Row) -> bool:
    """Whether the self judge can be told from chance, on its good side."""
    found = judge["judged"]
    return bool(found["apart_from_chance"] and found["accuracy"]["mean"] > 0.5)


def same(before: Any, now: Any) -> bool:
    """Whether two trees of settings agree; an option that only one of them knows does not count."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(same(before[name], now[name]) for name in set(before) & set(now))
    return before == now
