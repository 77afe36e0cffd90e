"""docs/objectives-study.md from the rows of the objectives' study."""

from __future__ import annotations

from pathlib import Path

from mllm_align.testbed.quickstart.phases import Recipe
from scenes_study.findings import Claim, Finding
from scenes_study.objectives import (
    COMPARED,
    LOST,
    METHODS,
    PICTURES,
    SEED,
    SHARES,
    TITLES,
    Row,
    chosen,
    read_tuning,
    tuning_name,
)
from scenes_study.page import HERE, WANTED, earlier, findings, hours, incomplete, table
from scenes_study.rows import Rows, figure, read_rows
from scenes_study.words import RULE

PAGE = HERE.parent / "docs" / "objectives-study.md"
SEEN = ("visual", "visual margin")
COLUMNS = ("CHAIR_i", "recall", "details", "POPE", *SEEN, "unbiased CHAIR_i", "unbiased recall", "words")
VISUAL = ("mdpo", "rdpo", "chip")
FORMS = tuple(name for base in COMPARED for name in (base, *(f"{how}_{base}" for how in SHARES)))

FINDINGS = (
    Finding(
        "Every objective hallucinates less than SFT",
        "CHAIR_i of each against that of the model it starts from.",
        tuple(Claim(name, "sft") for name in METHODS),
    ),
    Finding(
        "DPO, IPO and SLiC come out alike",
        "The paper's comparison of losses, offline; IPO and SLiC against DPO.",
        (Claim("ipo", "dpo", not_worse=True), Claim("slic", "dpo", not_worse=True)),
    ),
    Finding(
        "Mixed training is not worse than offline, whatever the loss",
        "The paper's Table 2 for other losses than DPO.",
        tuple(Claim(f"mixed_{name}", name, not_worse=True) for name in COMPARED),
    ),
    Finding(
        "A loss on a second image teaches to look at the image",
        "Captions under their own picture and under the edited one, against DPO's; margins in nats.",
        tuple(Claim(name, "dpo", f, higher=True) for name in VISUAL for f in ("visual", "visual_margin")),
    ),
    Finding(
        "A second reference is no gain (arXiv 2512.10040)",
        "The second reference is the SFT model after 120 further steps.",
        (Claim("dpo", "mrpo", not_worse=True),),
    ),
)

HOW = """## How it was made

    python benchmarks/objectives_study.py --work DIR --seeds 0 1 2

On 2 CPU cores. {hours}
Testbed, SFT, budget ({steps} steps of 32 prompts from 1,000 captions), measuring and intervals are
those of [the study of methods](study.md); so is the oracle that ranks the responses of `online` and
`mixed`. Each row is a file in `benchmarks/results/objectives_study`; rows that are there are not made
again.

- **Pairs**: true captions against corrupted ones; of `rdpo` with the picture that the SFT model's
  vision tower takes for most alike as the rejected image.
- **An SFT term** on the chosen response, of weight 1, is part of every loss, as of the quickstart's
  DPO: MPO and ORPO have it by themselves, CHiP alone is without, since its one sigmoid can't be part of
  a sum.
- **Tuned alike**: each method was trained on seed {seed}, which is not reported, with 3 scales (beta;
  of SimPO beta with gamma half of it) and 2 rates, and measured on {pictures} pictures without the bias
  that are in no reported split. The setting with the lowest CHAIR_i is taken, of those whose recall is
  at most {lost:.0f} points below SFT's; where none is, that with the highest recall. `online` and
  `mixed` take what their loss was given offline.
- **visual**: share of the 300 held-out captions whose log-probability is higher under their own picture
  than under the same picture with one thing of another kind (same place, colour, fog and noise);
  **visual margin**: by how many nats a caption, on average. SFT is right about nearly all already, so the
  margin tells more. The other columns are those of the study of methods.
- **MRPO's second reference** is the SFT model after {steps} further steps, the study's control.
"""


def write(results: Path, page: Path = PAGE) -> None:
    rows, _, _ = read_rows(results)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(rows, read_tuning(results)), encoding="utf-8")


def text(rows: Rows, tuning: dict[str, Row]) -> str:
    """The whole page."""
    missing = sum(seed not in rows.get(name, {}) for name in TITLES for seed in range(WANTED))
    told = {"steps": Recipe().dpo, "seed": SEED, "pictures": PICTURES, "lost": 100 * LOST}
    parts = [
        "# Objectives against each other, on Scenes\n",
        "Made by `benchmarks/objectives_study.py`; figures as they came out.\n",
        earlier(rows),
        incomplete(rows, list(TITLES), missing) if missing else "",
        HOW.format(hours=hours(rows), **told),
        "## All objectives\n\n" + table(rows, ("sft", *METHODS), COLUMNS, TITLES),
        "## Offline, online and mixed\n\n" + table(rows, ("sft", *FORMS), COLUMNS, TITLES),
        "## Tuning\n\n" + settings(tuning),
        "## Findings\n\n" + RULE + "\n" + findings(rows, FINDINGS),
    ]
    return "\n".join(part for part in parts if part)


def settings(tuning: dict[str, Row]) -> str:
    """A line for each method: CHAIR_i and recall of every setting, the chosen one in bold."""
    if "tune_sft" not in tuning:
        return "No rows yet.\n"
    lines = [
        f"CHAIR_i / recall in percent, SFT's {_both(tuning['tune_sft'])}; the chosen setting in bold.\n",
        "| method | scale, rate: CHAIR_i / recall |",
        "|---|---|",
    ]
    best = chosen(tuning)
    for name, method in METHODS.items():
        cells = []
        for setting in method.grid:
            if row := tuning.get(tuning_name(name, setting)):
                said = f"{setting[0]:g}, {setting[1]:g}: {_both(row)}"
                cells.append(f"**{said}**" if best.get(name) == setting else said)
        lines.append(f"| `{name}` | {'; '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _both(row: Row) -> str:
    return " / ".join(f"{100 * figure(row, name, 'tuning'):.1f}" for name in ("chair_i", "recall"))
