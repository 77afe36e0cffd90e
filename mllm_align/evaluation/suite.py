"""Several models, several benchmarks: each pair is an evaluation of its own, and one page has them all.

OUT/<model>/<benchmark>/ is what `evaluate` writes. Folders are checked before any model is opened; a
benchmark that fails is named and does not stop the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mllm_align import processes
from mllm_align.config import DataConfig, MeshConfig
from mllm_align.config.servers import BenchmarkJudge
from mllm_align.errors import InputError, NotFinite, first_few, one_line, refusal
from mllm_align.evaluation.base import EVALUATORS, EvaluationConfig, Evaluator, Item, open_evaluator
from mllm_align.evaluation.compare import read_evaluation, title_of
from mllm_align.evaluation.folders import place_among
from mllm_align.evaluation.judged import Judged
from mllm_align.evaluation.page import PAGE, write_page
from mllm_align.evaluation.results import RESULTS, Evaluation, about, check_folder
from mllm_align.evaluation.run import answered, questions
from mllm_align.files import names_apart
from mllm_align.locks import alone
from mllm_align.models.bundle import Bundle, load
from mllm_align.models.sources import open_model
from mllm_align.training.run_folder import read_metadata
from mllm_align.training.run_model import is_run


class Failure(NamedTuple):
    """evaluations: how many it cost."""

    what: str
    evaluations: int
    error: Exception

    def told(self) -> str:
        return f"{self.what}: {self.error}"


class Suite(NamedTuple):
    """results: by model and benchmark. sentences: how every model compares with the first. failures: what
    is missing among the results, and why."""

    results: dict[str, dict[str, Evaluation]]
    sentences: list[str]
    failures: list[Failure]

    def check(self) -> None:
        """Raises InputError or NotFinite, as the failures were, if there are any."""
        if self.failures:
            lost = sum(each.evaluations for each in self.failures)
            whole = lost + sum(map(len, self.results.values()))
            refused = any(isinstance(each.error, InputError) for each in self.failures)
            problem = f"{lost} of {whole} evaluations failed: {_told(self.failures)}"
            raise (InputError if refused else NotFinite)(problem)


@dataclass(frozen=True)
class Task:
    """A benchmark with its data, and what a model is asked."""

    name: str
    settings: EvaluationConfig
    data: Any
    items: list[Item]


def evaluate_all(
    models: Sequence[str | Path] | Mapping[str, Bundle],
    data: Any,
    evaluator: Evaluator | str | None = None,
    *,
    out: str | Path,
    batch_size: int = 8,
    seed: int = 0,
    config: DataConfig | None = None,
    judge: BenchmarkJudge | None = None,
    dtype: Any = "auto",
    mesh: MeshConfig | None = None,
    done: Callable[[str, str, Evaluation], None] | None = None,
) -> Suite:
    """Ask several models about one benchmark or several, and write a page that compares them.

    models: what `load` takes, named after the last parts of their paths; or Bundles by name. data: with an
    evaluator, what that takes; without one, a folder with a subfolder for each benchmark, named like it.
    out: a folder to write. judge: who rates the answers of `Judged` benchmarks. dtype, mesh: as `load`
    takes them. done: called with model, benchmark and what came of it. The same call goes on where it was
    stopped. Returns a Suite; its `failures` name the benchmarks that could not be asked, of which stderr
    tells at once. Raises InputError before any work for models and folders that can't be used, or where no
    benchmark can be asked.
    """
    named = _named(models, dtype, mesh)
    given = {
        "batch_size": batch_size,
        "seed": seed,
        "data": config or DataConfig(),
        "judge": judge or BenchmarkJudge(),
    }
    out = Path(out)
    if (out / RESULTS).exists():
        raise refusal(str(out), "holds one evaluation", "give another --out for several")
    asked = found_under(data) if evaluator is None else [(open_evaluator(evaluator), data)]
    tasks, failed = _tasks(asked, given, len(named))
    places = {(model, task.name): out / model / task.name for model in named for task in tasks}
    for place in places.values():
        check_folder(place)
    with alone(out):
        results: dict[str, dict[str, Evaluation]] = {}
        for model, opener in named.items():
            opened = cache(opener)  # once for all benchmarks
            results[model] = {}
            for task in tasks:
                place = places[model, task.name]
                try:
                    with alone(place):
                        made = answered(opened, task.items, task.data, task.settings, place)
                except (InputError, NotFinite) as error:
                    if processes.several():  # another process may not have met it
                        raise
                    failed.append(Failure(f"{model} on {task.name}", 1, error))
                    _warn(failed[-1])
                    continue
                results[model][task.name] = made
                if done is not None:
                    done(model, task.name, made)
            opened.cache_clear()
        sentences = processes.on_first(lambda: _page(results, places, out))
    return Suite(results, sentences, failed)


def _page(
    results: Mapping[str, Mapping[str, Evaluation]], places: Mapping[tuple[str, str], Path], out: Path
) -> list[str]:
    """Drawn from the folders: these have the answers beside a judge's verdicts."""
    scored = {
        model: {
            name: read_evaluation(places[model, name])
            for name, each in own.items()
            if each.results["scores"]
        }
        for model, own in results.items()
    }
    return write_page(scored, out / PAGE)


def found_under(root: Any) -> list[tuple[Evaluator, Path]]:
    """The benchmarks whose folders are there; _ stands for -, too. Raises InputError where none is."""
    folder = Path(root) if isinstance(root, str | Path) else None
    if folder is None or not folder.is_dir():
        raise InputError(f"data is {one_line(root)}; give a folder with a subfolder for each benchmark")
    found = [
        (kind(), place)
        for name, kind in EVALUATORS.items()
        if (place := place_among(folder, name, kind)) is not None and place.is_dir()
    ]
    if not found:
        known = ", ".join(dict.fromkeys(kind.folder or name for name, kind in EVALUATORS.items()))
        raise refusal(str(folder), "has no subfolder that is named like a benchmark", f"name them {known}")
    used = {place for _, place in found}
    left = [each.name for each in sorted(folder.iterdir()) if each.is_dir() and each not in used]
    if left:
        processes.say(f"left out, as no benchmark has their names: {first_few(left)}")
    return found


def _named(
    models: Sequence[str | Path] | Mapping[str, Bundle], dtype: Any, mesh: MeshConfig | None
) -> dict[str, Callable[[], Bundle]]:
    """What opens each model, by its name. Raises InputError for what is none."""
    if not models:
        raise InputError("there are no models; give at least one")
    if isinstance(models, Mapping):
        return {name: (lambda bundle=bundle: bundle) for name, bundle in models.items()}
    paths = [models] if isinstance(models, str | Path) else list(models)
    for path in paths:
        if is_run(Path(path)):
            read_metadata(Path(path))
        else:
            open_model(path)
    return {
        name: (lambda path=path: load(path, dtype, mesh))
        for name, path in zip(names_apart(paths), paths, strict=True)
    }


def _tasks(
    asked: Sequence[tuple[Evaluator, Any]], given: Mapping[str, Any], models: int
) -> tuple[list[Task], list[Failure]]:
    """What can be asked, and what can't and why. Raises InputError where nothing can."""
    tasks: list[Task] = []
    problems: dict[str, str] = {}
    for evaluator, data in asked:
        asks = given if isinstance(evaluator, Judged) else {**given, "judge": BenchmarkJudge()}
        settings = EvaluationConfig(evaluator, **asks)
        name = title_of(about(settings, {})["benchmark"])
        try:
            tasks.append(Task(name, settings, data, questions(settings, data)))
        except InputError as error:
            problems[name] = str(error)
    if processes.several():  # what one process can't read none asks about
        problems |= {
            name: told for each in processes.gathered(lambda: problems) for name, told in each.items()
        }
    failed = [Failure(name, models, InputError(problem)) for name, problem in problems.items()]
    tasks = [task for task in tasks if task.name not in problems]
    if not tasks:
        raise InputError(_told(failed))
    for each in failed:
        _warn(each)
    return tasks, failed


def _told(failed: Sequence[Failure]) -> str:
    return " | ".join(each.told() for each in failed)


def _warn(failed: Failure) -> None:
    if processes.first():
        print(f"{failed.told()}; the others go on", file=sys.stderr, flush=True)
