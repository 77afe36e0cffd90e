"""docs/data-study.md from the rows of the data study."""

from __future__ import annotations

from pathlib import Path

from mllm_align.evaluation.intervals import Interval
from scenes_study import figures
from scenes_study.findings import Claim, Finding
from scenes_study.page import HERE, WANTED, earlier, findings, hours, incomplete, table, written
from scenes_study.rows import Rows, read_rows, spread
from scenes_study.sets import SETS, SIZES, groups
from scenes_study.words import BRIEF, RULE

PAGE = HERE.parent / "docs" / "data-study.md"
TITLES = {"sft": "SFT"} | {name: made.title for name, made in SETS.items()}
KINDS = ("corrupted", "bdhs")

FINDINGS = (
    Finding(
        "Rejected responses that differ little from the chosen teach most",
        "One false fact against all facts false, and against another picture's caption.",
        (
            Claim("facts_1", "facts_all"),
            Claim("facts_1", "other_picture"),
            Claim("corrupted_1000", "other_picture"),
            Claim("bdhs_1000", "other_picture"),
        ),
    ),
    Finding(
        "The chosen responses need not come from a stronger model",
        "The policy's best sample, or a better model's caption, each with its corrupted form, against the "
        "true caption with its own.",
        (
            Claim("chosen_best", "corrupted_1000", not_worse=True),
            Claim("chosen_better", "corrupted_1000", not_worse=True),
            Claim("best_and_worst", "corrupted_1000", not_worse=True),
        ),
    ),
    Finding(
        "Prompts of many kinds do no harm, and teach what captions don't",
        "Half of the captions replaced by questions.",
        (
            Claim("both_prompts", "corrupted_1000", not_worse=True),
            Claim("both_prompts", "corrupted_1000", "pope", higher=True),
            Claim("questions", "sft"),
        ),
    ),
    Finding(
        "Small sets do most of the work",
        "1,000 pairs against 4,000, and 4,000 against 250, at the same number of steps.",
        (
            Claim("corrupted_1000", "corrupted_4000", not_worse=True),
            Claim("bdhs_1000", "bdhs_4000", not_worse=True),
            Claim("corrupted_4000", "corrupted_250"),
            Claim("bdhs_4000", "bdhs_250"),
        ),
    ),
)

HOW = """## How it was made

    python benchmarks/data_study.py --work DIR --seeds 0 1 2

On 2 CPU cores. {hours}
Testbed, SFT, budget (120 steps of 32 pairs), beta, rate, measuring and intervals are those of
[the study of methods](study.md); only the pairs differ. Nothing was tuned for any set. Each row, one set
of one seed, is a file in `benchmarks/results/data_study`; rows that are there are not made again. A smaller
set is the beginning of a larger one of its kind. A better model: the SFT model after 120 more steps on
1,000 true captions of pictures without the language bias (`sft_unbiased` there). The base model was trained
anew for these rows, so they compare with each other, not with that study's. Two rows were made at a time,
beside other work: the time is an upper bound.
"""


def write(results: Path, page: Path = PAGE) -> None:
    """Write the page and its figure, beside it in figures/."""
    rows, _, _ = read_rows(results)
    beside = page.parent / "figures"
    beside.mkdir(parents=True, exist_ok=True)
    if series := sizes(rows):
        drawn = figures.curves(series, "pairs", "CHAIR_i on broken, percent")
        (beside / "data_study_sizes.svg").write_text(drawn, encoding="utf-8")
    page.write_text(text(rows), encoding="utf-8")


def sizes(rows: Rows) -> dict[str, list[tuple[int, Interval]]]:
    """Kind -> CHAIR_i of each size that has rows."""
    found = {
        kind: [(n, spread(rows[f"{kind}_{n}"], "chair_i")) for n in SIZES if f"{kind}_{n}" in rows]
        for kind in KINDS
    }
    return {kind: points for kind, points in found.items() if len(points) > 1}


def text(rows: Rows) -> str:
    """The whole page."""
    missing = sum(seed not in rows.get(name, {}) for name in TITLES for seed in range(WANTED))
    parts = [
        "# What makes preference pairs work, on Scenes\n",
        "Made by `benchmarks/data_study.py`; figures as they came out.\n",
        earlier(rows),
        incomplete(rows, list(TITLES), missing) if missing else "",
        HOW.format(hours=hours(rows)),
        *(f"## {title}\n\n{note}{table(rows, names, BRIEF, TITLES)}" for title, note, names in groups()),
    ]
    if sizes(rows):
        parts.append("![CHAIR_i over the number of pairs](figures/data_study_sizes.svg)\n")
    parts += [
        "## The pairs\n\n" + written(rows, list(SETS)),
        "## Findings\n\n" + RULE + "\n" + findings(rows, FINDINGS),
    ]
    return "\n".join(part for part in parts if part)
