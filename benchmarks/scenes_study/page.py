"""docs/study.md from the rows of the study: tables, figures and the verdict on each finding."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm_align.evaluation.intervals import Interval, over_seeds
from mllm_align.testbed.quickstart.phases import Recipe
from scenes_study import figures
from scenes_study.findings import FINDINGS, LEARNED, Finding, Judged, judge_finding
from scenes_study.rows import REWARDS, Rows, figure, read_rows, spread, unit, useful
from scenes_study.words import (
    BRIEF,
    COLUMNS,
    COSTS,
    EARLIER,
    HOW,
    MISSING,
    OWN_COLUMNS,
    PAPERS,
    POPE,
    REWARDED,
    RULE,
    TITLES,
    WRITTEN,
)

HERE = Path(__file__).resolve().parents[1]
PAGE = HERE.parent / "docs" / "study.md"
WANTED = 3  # seeds
BY_BDHS = ("dpo_corrupted", *(name for name in TITLES if name.startswith("bdhs_")))


def write(results: Path, page: Path = PAGE) -> None:
    """Write the page and its figures, beside it in figures/."""
    rows, judges, rewards = read_rows(results)
    beside = page.parent / "figures"
    beside.mkdir(parents=True, exist_ok=True)
    for name, svg in drawings(rows).items():
        (beside / name).write_text(svg, encoding="utf-8")
    page.write_text(text(rows, judges, rewards), encoding="utf-8")


def text(rows: Rows, judges: dict[int, dict[str, Any]], rewards: Rows) -> str:
    """The whole page."""
    return "\n".join(
        [
            "# The method's variants on Scenes\n",
            "Made by `benchmarks/study.py`; figures as they came out.\n",
            earlier(rows),
            standing(rows | rewards, judges),
            HOW.format(hours=hours(rows)),
            "## The self judge first\n\n" + self_judge(judges),
            "## All variants\n\n" + table(rows, tuple(TITLES), tuple(COLUMNS)) + pope_note(rows),
            drawings_text(rows),
            *(f"## {title}\n\n{note}{table(rows, names, BRIEF)}" for title, note, names in PAPERS),
            "## Reward models on each kind of rejected response\n\n" + reward_table(rewards),
            "## What BDHS wrote\n\n" + written(rows),
            "## Time and losses\n\n" + costs(rows),
            "## The paper's findings\n\n" + RULE + "\n" + findings(rows, FINDINGS),
            "## What rewards teach\n\n" + findings(rows, LEARNED),
        ]
    )


# ---- parts -----------------------------------------------------------------------------------------


def earlier(rows: Rows) -> str:
    """Whether rows were made with another recipe than today's."""
    today = json.loads(json.dumps(asdict(Recipe())))
    recipes = [row.get("settings", {}).get("recipe") for each in rows.values() for row in each.values()]
    return EARLIER if any(recipe not in (None, today) for recipe in recipes) else ""


def standing(rows: Rows, judges: dict[int, dict[str, Any]]) -> str:
    """What is missing, if anything."""
    seeds = range(WANTED)
    out = [s for s in seeds if s in judges and not useful(judges[s])]
    missing = [
        f"{name} of seed {s}"
        for s in seeds
        for name in (*REWARDS, *TITLES)
        if s not in rows.get(name, {}) and not (name.endswith("self") and s in out)
    ]
    if not missing:
        return ""
    return incomplete(rows, [*REWARDS, *TITLES], len(missing))


def incomplete(rows: Rows, names: Sequence[str], missing: int) -> str:
    whole = [name for name in names if len(rows.get(name, {})) >= WANTED]
    return MISSING.format(
        missing=missing,
        all=WANTED * len(names),
        whole=len(whole),
        variants=len(names),
        seeds=WANTED,
    )


def hours(rows: Rows) -> str:
    seconds = sum(row["seconds"]["whole"] for each in rows.values() for row in each.values())
    count = sum(map(len, rows.values()))
    return f"{count} rows took {seconds / 3600:.1f} hours in all; SFT takes about 4 minutes a seed besides."


def self_judge(judges: dict[int, dict[str, Any]]) -> str:
    if not judges:
        return "Not measured yet.\n"
    lines = ["| seed | pairs | decided | accuracy of decided | p of chance | told from chance |"]
    lines += ["|--:|--:|--:|--:|--:|---|"]
    for seed, row in sorted(judges.items()):
        j = row["judged"]
        mean = "none" if j["accuracy"]["mean"] is None else f"{j['accuracy']['mean']:.3f}"
        told = "yes" if useful(row) else "no, or worse: its variants are left out"
        lines.append(
            f"| {seed} | {j['pairs']} | {j['decided']} | {mean} | {j['p_of_chance']:.2g} | {told} |"
        )
    said = (
        "Captions against their corrupted forms, by the code of `mllm-align judge`. The undecided are ties."
    )
    return said + "\n\n" + "\n".join(lines) + "\n"


def cell(interval: Interval, unit: float = 100.0) -> str:
    if math.isnan(interval.mean):
        return ""
    mean = f"{interval.mean * unit:.1f}"
    if math.isnan(interval.low):
        return mean
    return f"{mean} ± {(interval.high - interval.mean) * unit:.1f}"


def table(
    rows: Rows, names: Sequence[str], columns: Sequence[str], titles: Mapping[str, str] = TITLES
) -> str:
    """One line for each variant that has a row."""
    lines = ["| variant | seeds | " + " | ".join(columns) + " |", "|---|--:|" + "--:|" * len(columns)]
    for name in names:
        each = rows.get(name, {})
        if each:
            which = [(COLUMNS | OWN_COLUMNS)[c] for c in columns]
            cells = [cell(spread(each, *w), unit(w[0])) for w in which]
            lines.append(f"| {titles[name]} (`{name}`) | {len(each)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pope_note(rows: Rows) -> str:
    values = [figure(row, "pope", "broken") for each in rows.values() for row in each.values()]
    if not values or max(abs(v - 0.5) for v in values) > 0.05:
        return ""
    return "\n" + POPE


def drawings(rows: Rows) -> dict[str, str]:
    points = [
        (name, spread(rows[name], "chair_i"), spread(rows[name], "recall"))
        for name in TITLES
        if name in rows
    ]
    if not points:
        return {}
    return {
        "study_chair.svg": figures.ranges(
            [(name, chair) for name, chair, _ in points], "CHAIR_i on broken, percent"
        ),
        "study_recall.svg": figures.scatter(points, "CHAIR_i, percent", "recall, percent"),
    }


def drawings_text(rows: Rows) -> str:
    if not rows:
        return ""
    return (
        "![CHAIR_i of every variant, with intervals over seeds](figures/study_chair.svg)\n\n"
        "![Recall against CHAIR_i](figures/study_recall.svg)\n"
    )


def reward_table(rewards: Rows) -> str:
    kinds = list(REWARDS.values())
    lines = [REWARDED, "| learned from | seeds | " + " | ".join(kinds) + " | length |"]
    lines.append("|---|--:|" + "--:|" * (len(kinds) + 1))
    for name, each in rewards.items():
        asked = [row["asked"] for row in each.values()]
        cells = [cell(over_seeds([a[kind]["right"] / a[kind]["pairs"] for a in asked])) for kind in kinds]
        length = _mean(a[REWARDS[name]]["length_correlation"] for a in asked)
        lines.append(f"| {REWARDS[name]} | {len(each)} | {' | '.join(cells)} | {length:.2f} |")
    return "\n".join(lines) + "\n"


def written(rows: Rows, data: Sequence[str] = BY_BDHS) -> str:
    """How much the rejected responses of the data differ, and what is wrong with them."""
    lines = [
        WRITTEN,
        "| data | pairs | words changed | hallucinated | differ enough, first | all |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in data:
        found = [row["pairs"] for row in rows.get(name, {}).values() if "pairs" in row]
        if found:
            cells = [f"{_mean(p['count'] for p in found):.0f}"]
            cells += [f"{100 * _mean(p['words_changed'] for p in found):.1f}"]
            counts = [p["rejected"] for p in found]
            cells += [f"{100 * _mean(c['hallucinated'] / max(c['mentions'], 1) for c in counts):.1f}"]
            for which in (0, -1):
                tries = [p["differ_after"][which] for p in found if "differ_after" in p]
                cells.append(f"{100 * _mean(tries):.1f}" if tries else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def costs(rows: Rows) -> str:
    names = {
        "s a step": "seconds_per_step",
        "making responses": "rollout/seconds",
        "judging": "annotate/seconds",
        "update": "update/seconds",
        "groups used": "groups_used",
    }
    lines = [
        COSTS,
        "| variant | " + " | ".join(names) + " | loss | margin | whole, s |",
        "|---|" + "--:|" * (len(names) + 3),
    ]
    for variant in TITLES:
        each = [row for row in rows.get(variant, {}).values() if "training" in row]
        if each:
            means = [row["training"]["means"] for row in each]
            cells = [
                f"{statistics.median(m[n] for m in means):.2f}" if all(n in m for m in means) else ""
                for n in names.values()
            ]
            for n in ("loss", "rewards/margin"):
                last = [row["training"]["last_steps"].get(n) for row in each]
                cells.append("" if None in last else f"{statistics.median(last):.3f}")
            cells.append(f"{statistics.median(row['seconds']['whole'] for row in each):.0f}")
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def findings(rows: Rows, those: Sequence[Finding]) -> str:
    parts = []
    for number, finding in enumerate(those, 1):
        verdict, claims = judge_finding(rows, finding)
        parts.append(
            f"### {number}. {finding.words}\n\n**{verdict[0].upper() + verdict[1:]}.** {finding.meant}\n"
        )
        parts.append(
            "| claim | seeds | difference over seeds | verdict | over pictures |\n|---|--:|--:|---|--:|\n"
            + "".join(_claim(claim) for claim in claims)
        )
    return "\n".join(parts)


def _claim(judged: Judged) -> str:
    seeds, pictures = (_ends(each, judged.unit) for each in (judged.over, judged.pictures))
    return f"| {judged.words} | {judged.over.n} | {seeds} | {judged.verdict} | {pictures} |\n"


def _ends(interval: Interval | None, unit: float) -> str:
    if interval is None or math.isnan(interval.mean):
        return ""
    mean = f"{unit * interval.mean:+.1f}"
    if math.isnan(interval.low):
        return mean
    return f"{mean} ({unit * interval.low:+.1f} to {unit * interval.high:+.1f})"


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
