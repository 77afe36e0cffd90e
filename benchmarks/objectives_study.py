"""Objectives against each other on Scenes, tuned by one grid, over several seeds.

    python benchmarks/objectives_study.py --work DIR   # tuning, then seeds 0 to 2; stop and start at will
    python benchmarks/objectives_study.py --work DIR --seeds 0 --only sft dpo mdpo
    python benchmarks/objectives_study.py --report     # only write docs/objectives-study.md

DIR may be the folder of study.py: pictures and SFT models are shared. Every row, one setting or method of
one seed, is a file in benchmarks/results/objectives_study; an existing row with the same settings is not
computed again. A row takes about a minute, one whose responses the policy makes about four; all about three
hours.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import study
from scenes_study import objectives_page
from scenes_study.objectives import (
    METHODS,
    SEED,
    TITLES,
    Objectives,
    base_of,
    chosen,
    read_tuning,
    tuning_names,
    tuning_variants,
    variants,
)

from mllm_align.errors import InputError
from mllm_align.testbed.quickstart.phases import Recipe

RESULTS = study.HERE / "results" / "objectives_study"
NAMES = tuple(TITLES)


def run(options: argparse.Namespace, recipe: Recipe) -> None:
    """Tune what is asked for, then make its rows."""
    if SEED in options.seeds:
        raise InputError(f"--seeds has {SEED}, which settings are chosen on; name others")
    names = [name for name in NAMES if not options.only or name in options.only]
    tuned = [name for name in METHODS if name in {base_of(each) for each in names}]

    def rows(seeds: list[int], made: dict, wanted: list[str]) -> None:
        kind = partial(Objectives, variants=made)
        study.run(options.work, seeds, [], options.results, recipe, kind, wanted)

    if tuned:
        rows([SEED], tuning_variants(), tuning_names(tuned))
    settings = chosen(read_tuning(options.results))
    rows(options.seeds, variants({name: settings[name] for name in tuned}), names)


def main(argv: list[str] | None = None, recipe: Recipe | None = None) -> None:
    options = study.parse(argv, __doc__, NAMES, RESULTS, objectives_page.PAGE)
    try:
        if not options.report:
            run(options, recipe or Recipe())
    finally:
        objectives_page.write(options.results, options.page)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sys.exit(str(error))
