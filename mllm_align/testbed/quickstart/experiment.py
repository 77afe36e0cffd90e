"""The whole method on the synthetic testbed: SFT, BDHS, DPO, evaluated before and after.

A small LLaVA learns vision and language from scratch, on pictures whose captions have a language bias. It
then generates its own rejected responses (BDHS) and is aligned with DPO. Hallucinations in its captions of
pictures that break the bias are counted exactly, before and after, and after as many further steps of SFT.

OUT/recipe.json   the recipe of the run
OUT/scenes        the pictures, the same for all seeds
OUT/base          the common start of all seeds: model folders (start, and one of each lesson), their
                  training in runs/
OUT/seed-S        one seed: model folders (sft, control, aligned), their training in runs/, pairs in data/,
                  and counts in measured.json
OUT/seconds.json  duration of each phase
OUT/results.json  metrics; OUT/report.html shows them
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm_align.errors import one_line, refusal
from mllm_align.files import json_text, new_file, parse_json
from mllm_align.locks import INSIDE, alone
from mllm_align.testbed.quickstart.phases import Base, Clock, Pictures, Recipe, Seed
from mllm_align.testbed.quickstart.reporting import report
from mllm_align.testbed.quickstart.results import summary, verdict
from mllm_align.testbed.report.page import write


def run(out: Path, seeds: int = 1, recipe: Recipe | None = None) -> dict[str, Any]:
    """Run all phases under `out`; phases finished in an earlier run of the same recipe are kept.

    Returns the contents of results.json. Raises InputError if `out` has other contents.
    """
    with alone(out):
        return _run(out, seeds, recipe or Recipe())


def _run(out: Path, seeds: int, recipe: Recipe) -> dict[str, Any]:
    take(out, seeds, recipe)
    clock = Clock(out / "seconds.json")
    base = Base(out / "base", 0, recipe, Pictures(out / "scenes", recipe.scenes), clock)
    runs = [Seed(out / f"seed-{seed}", seed, recipe, base.read, clock) for seed in range(seeds)]
    measured = [each(base) for each in runs]
    try:
        results = summary(measured, recipe.mask_rate) | {"seconds": clock.seconds}
        page = report(runs[0], measured, results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        at = f"{out}, seed-*/measured.json or what it was measured from"
        raise refusal(at, f"is damaged ({one_line(error)})", "remove it, and it is made again") from error
    with new_file(out / "results.json") as file:
        file.write(json_text(results, indent=2) + "\n")
    write(page, out / "report.html")
    for sentence in verdict(results):
        print(sentence)
    print(f"report: {out / 'report.html'}")
    return results


def take(out: Path, seeds: int, recipe: Recipe) -> None:
    """Write recipe.json into `out`. Raises InputError if `out` has a different recipe or other contents."""
    stamp, text = out / "recipe.json", json.dumps({"seeds": seeds, "recipe": asdict(recipe)}, indent=2)
    if out.exists() and not out.is_dir():
        raise refusal(str(out), "is a file", "name a new folder")
    if out.exists() and any(path.name != INSIDE for path in out.iterdir()):
        try:
            there = parse_json(stamp.read_bytes())["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise refusal(str(out), "holds something else", "name a new folder") from error
        if there != json.loads(text)["recipe"]:
            raise refusal(str(out), "holds a run of another recipe", "name a new folder")
    with new_file(stamp) as file:
        file.write(text + "\n")
