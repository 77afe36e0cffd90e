"""What makes preference pairs work, on Scenes: sets of pairs against each other, over several seeds.

    python benchmarks/data_study.py --work DIR              # all sets, seeds 0 to 2; stop and start at will
    python benchmarks/data_study.py --work DIR --seeds 0 --only sft facts_1 bdhs_250
    python benchmarks/data_study.py --report                # only write docs/data-study.md

DIR may be the folder of study.py: pictures and SFT models are shared. Every row, one set of one seed, is a
file in benchmarks/results/data_study; an existing row with the same settings is not computed again. A row
takes two to four minutes, three seeds about three hours.
"""

from __future__ import annotations

import sys

import study
from scenes_study import sets_page
from scenes_study.sets import SETS, Sets

from mllm_align.errors import InputError
from mllm_align.testbed.quickstart.phases import Recipe

RESULTS = study.HERE / "results" / "data_study"
NAMES = ("sft", *SETS)


def main(argv: list[str] | None = None, recipe: Recipe | None = None) -> None:
    options = study.parse(argv, __doc__, NAMES, RESULTS, sets_page.PAGE)
    try:
        if not options.report:
            places = options.work, options.seeds, options.only, options.results
            study.run(*places, recipe or Recipe(), Sets, NAMES)
    finally:
        sets_page.write(options.results, options.page)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        sys.exit(str(error))
