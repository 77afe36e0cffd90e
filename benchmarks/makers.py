"""Makers of training data on Scenes, each against a random choice of the same size, over several seeds.

    python benchmarks/makers.py --work DIR             # all rows, seeds 0 to 2; stop and start at will
    python benchmarks/makers.py --work DIR --seeds 0 --only retrieved retrieved_random
    python benchmarks/makers.py --report               # the table of the rows that are done

DIR contains pictures, models and data in the layout of `benchmarks/study.py`, and may be the same folder.
Every row, one maker or control of one seed, is a file in benchmarks/results/makers; an existing row with
the same settings is not computed again. A row takes two to five minutes on two quiet cores, that of the
cascade ten more for the reward models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import study
from scenes_study.makers import MAKERS, Makers
from scenes_study.rows import difference, read_rows, spread

from mllm_align.errors import InputError
from mllm_align.testbed.quickstart.phases import Recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "makers"
FIGURES = ("chair_i", "recall", "details", "pope")


def report(results: Path) -> str:
    """A table: each maker and its control, and the difference over the seeds that both have, in percent and
    points, with half of the 95% Student-t interval."""
    rows, _, _ = read_rows(results)
    lines = ["| data | seeds | " + " | ".join(FIGURES) + " |", "|---|--:|" + "--:|" * len(FIGURES)]
    for name in (each for each in MAKERS if each in rows):
        cells = [_told(spread(rows[name], figure)) for figure in FIGURES]
        lines.append(f"| `{name}` | {len(rows[name])} | {' | '.join(cells)} |")
        maker = name.removesuffix("_random")
        if name != maker and maker in rows:
            both = sorted(set(rows[name]) & set(rows[maker]))
            cells = [_told(difference(rows[maker], rows[name], figure)) for figure in FIGURES]
            lines.append(f"| difference | {len(both)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(interval: Any) -> str:
    half = (interval.high - interval.low) / 2
    return f"{100 * interval.mean:.1f}" + (f" ± {100 * half:.1f}" if half == half and half else "")


def main(argv: list[str] | None = None, recipe: Recipe | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder of pictures, models and data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], choices=[*MAKERS], metavar="ROW")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.work is None and not options.report:
        parser.error("give --work DIR, or --report")
    if not options.report:
        places = options.work, options.seeds, options.only, options.results
        study.run(*places, recipe or Recipe(), Makers, tuple(MAKERS))
    print(report(options.results))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sys.exit(str(error))
