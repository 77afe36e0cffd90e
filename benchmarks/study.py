"""The method's variants against each other on Scenes, with one budget, over several seeds.

    python benchmarks/study.py --work DIR              # all variants, seeds 0 to 2; stop and start at will
    python benchmarks/study.py --work DIR --seeds 0 --only sft bdhs_online
    python benchmarks/study.py --report                # write docs/study.md from the rows that are done

DIR contains pictures, models and pairs, in the layout of `mllm-align quickstart`. Every row, one variant of
one seed, is a file in benchmarks/results/study; an existing row with the same settings is not computed
again. A row takes two to five minutes, three seeds about three hours.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scenes_study import page
from scenes_study.rows import JUDGE, REWARDS, same, useful
from scenes_study.variants import JUDGED_BY_SELF, VARIANTS, Study

from mllm_align.errors import InputError
from mllm_align.files import new_file
from mllm_align.testbed.quickstart.experiment import take
from mllm_align.testbed.quickstart.phases import Base, Clock, Pictures, Recipe

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "study"
NAMES = [JUDGE, *REWARDS, *VARIANTS]
GUESS = {"row": 150.0, "base": 300.0, "SFT": 250.0}  # seconds, before any row is there


def file_of(results: Path, name: str, seed: int) -> Path:
    return results / f"{name}-{seed}.json"


def read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


def done(study: Study, results: Path, name: str) -> bool:
    row = read(file_of(results, name, study.seed))
    return row is not None and same(row["settings"], study.stamp(name)["settings"])


def expected(name: str, results: Path) -> float:
    """Seconds that a row will take: what the same variant took, or all others."""
    rows = [json.loads(f.read_text()) for f in sorted(results.glob("*-*.json"))]
    alike = [r["seconds"]["whole"] for r in rows if r["variant"] == name]
    took = alike or [r["seconds"]["whole"] for r in rows if r["variant"] != JUDGE]
    return sum(took) / len(took) if took else GUESS["row"]


def plan(studies: list[Study], names: list[str], results: Path, base: Base) -> None:
    """Say what is to be done and how long it will take."""
    total = 0.0 if base.model.exists() else GUESS["base"]
    for study in studies:
        todo = [name for name in names if not done(study, results, name)]
        judge = read(file_of(results, JUDGE, study.seed))
        if judge and not useful(judge):
            todo = [name for name in todo if name not in JUDGED_BY_SELF]
        seconds = sum(expected(name, results) for name in todo)
        seconds += GUESS["SFT"] if todo and not (study.out / "sft").exists() else 0
        total += seconds
        print(f"seed {study.seed}: {len(todo)} of {len(names)} rows to make, about {seconds / 60:.0f} min")
    print(f"together about {total / 3600:.1f} h", flush=True)


def make(study: Study, name: str, results: Path) -> None:
    file = file_of(results, name, study.seed)
    judge = read(file_of(results, JUDGE, study.seed))
    if name in JUDGED_BY_SELF and not (judge and useful(judge)):
        print(f"{name}, seed {study.seed}: left out, the self judge can't be told from chance", flush=True)
        return
    print(f"== {name}, seed {study.seed}: about {expected(name, results):.0f} s", flush=True)
    began = time.perf_counter()
    row = study.row(name)
    with new_file(file) as out:
        out.write(json.dumps(row, separators=(",", ":")) + "\n")
    print(f"{name}, seed {study.seed}: {time.perf_counter() - began:.0f} s", flush=True)


def run(
    work: Path,
    seeds: list[int],
    only: list[str],
    results: Path,
    recipe: Recipe,
    kind: Callable[..., Study] | None = None,
    all_names: Sequence[str] = tuple(NAMES),
) -> None:
    """Make the rows that are missing. kind: how a seed's rows are made; `Study` by default."""
    take(work, len(seeds), recipe)
    clock, read_pictures = Clock(work / "seconds.json"), Pictures(work / "scenes", recipe.scenes)
    base = Base(work / "base", 0, recipe, read_pictures, clock)
    of_seed = kind or Study
    studies = [of_seed(work / f"seed-{seed}", seed, recipe, read_pictures, clock) for seed in seeds]
    needed = {JUDGE} if JUDGED_BY_SELF & set(only) else set()
    names = [name for name in all_names if not only or name in {*only, *needed}]
    plan(studies, names, results, base)
    for study in studies:
        todo = [name for name in names if not done(study, results, name)]
        if todo:
            study.begin(base)
        for name in todo:
            make(study, name, results)


def parse(
    argv: list[str] | None = None,
    description: str | None = __doc__,
    names: Sequence[str] = tuple(NAMES),
    results: Path = RESULTS,
    to: Path = page.PAGE,
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder of pictures, models and pairs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="ROW")
    parser.add_argument("--report", action="store_true", help=f"only write {to.name}")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--page", type=Path, default=to)
    options = parser.parse_args(argv)
    if options.work is None and not options.report:
        parser.error("give --work DIR, or --report")
    return options


def main(argv: list[str] | None = None, recipe: Recipe | None = None) -> None:
    options = parse(argv)
    try:
        if not options.report:
            run(options.work, options.seeds, options.only, options.results, recipe or Recipe())
    finally:
        page.write(options.results, options.page)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sys.exit(str(error))
