"""An evaluation: the model is asked once, its answers are scored, figures and lines are written.

While it runs, answers are appended to OUT.part, so that the same command goes on where it was stopped. At
the end OUT (JSON) has the figures, with the settings and fingerprints that they follow from, and OUT.jsonl
has a line for each record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mllm_align import processes
from mllm_align.config import DataConfig, part_files, to_json
from mllm_align.data.encode import Encoded, Encoder, fingerprint
from mllm_align.errors import InputError, NotFinite, not_finite, one_line, refusal
from mllm_align.evaluation.base import (
    EVALUATORS,
    Answer,
    Context,
    EvaluationConfig,
    Evaluator,
    Item,
    check_items,
    check_scored,
    figures,
)
from mllm_align.files import json_text, lines_beside, new_file, parse_json, read_json
from mllm_align.generation.bdhs_job import trained_digest
from mllm_align.generation.decode import Generator
from mllm_align.generation.respond import respond
from mllm_align.locks import alone
from mllm_align.models.bundle import Bundle, opened
from mllm_align.part_file import PartFile, tell_finished
from mllm_align.prepare import check_batch, name_weights, prepare
from mllm_align.registry import part_name, registered_name
from mllm_align.training.run_folder import versions
from mllm_align.training.score import response_logps

T = TypeVar("T")


class Evaluation(NamedTuple):
    """results: settings, fingerprints, `scores` and `intervals` by the names of the figures. lines: a
    dictionary for each record."""

    results: dict[str, Any]
    lines: list[dict[str, Any]]


def evaluate(
    model: str | Path | Bundle,
    data: Any,
    evaluator: Evaluator | str,
    *,
    out: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    config: DataConfig | None = None,
) -> Evaluation:
    """Ask a model about all records and score its answers.

    model: a Bundle, or what `load` takes: a model, or a run's folder. data: what the evaluator takes; by
    default as `train` takes it. evaluator: an object, or the name of one or of a user's, `file.py:Name`,
    with its default settings. out: a file to write, JSON; its lines go beside it. config: a DataConfig,
    how data are read. The same call goes on where it was stopped, and reads `out` where it is done.
    Returns an Evaluation: figures with their intervals, and a line for each record. Raises InputError for
    data or an evaluator that can't be used and an `out` of something else; NotFinite where numbers of
    some records are not finite, after all others, whose answers are kept.
    """
    asked: Evaluator = EVALUATORS.find(evaluator)() if isinstance(evaluator, str) else evaluator
    settings = EvaluationConfig(asked, data=config or DataConfig(), batch_size=batch_size, seed=seed)
    bundle = opened(model)
    if out is None:
        return _evaluate(bundle, data, settings, None)
    lines_beside(Path(out))
    with alone(Path(out)):
        return _evaluate(bundle, data, settings, Path(out))


def _evaluate(bundle: Bundle, data: Any, settings: EvaluationConfig, out: Path | None) -> Evaluation:
    began, evaluator, config = time.time(), settings.evaluator, settings.data
    items = _guarded(evaluator, lambda: check_items(evaluator, evaluator.items(data, config)))
    answers = evaluator.references if evaluator.needs == "logps" else 0
    whole = replace(config, max_records=None)  # items may be several of a record
    encoder, records, left_out = prepare(bundle, [item.record for item in items], whole, answers)
    check_batch(settings.batch_size, len(records))
    # only what is written must be found again by its name: in memory, any class will do
    own = asdict(evaluator) if out is None else to_json(evaluator)
    stamp = _stamp(bundle, settings, own, items, records)
    job = None if out is None else _Job(out, stamp, records)
    if job is not None:
        begun = processes.on_first(lambda: {"done": job.start(), "finished": [*job.finished.values()]})
        if begun["done"] is not None:
            tell_finished(job.out)
            return Evaluation(*begun["done"])
        job.finished = {row["index"]: row for row in begun["finished"]}
    with nullcontext() if job is None else job:
        given = _answers(bundle, encoder, records, settings, job)
    asked = [items[each.index] for each in records]
    context = Context(bundle, config, None if out is None else out.with_suffix(".answers"))
    scored = _guarded(evaluator, lambda: list(evaluator.score_all(asked, given, context)))
    check_scored(evaluator, scored, asked)
    found = figures(evaluator, asked, scored)
    results = {
        **stamp,
        "data": str(data) if isinstance(data, str | Path) else None,
        "model": str((bundle.folder.named or bundle.folder.path).resolve()),
        "n": len(records),
        "left_out": len(left_out),
        "scores": {name: each.mean for name, each in found.items()},
        "intervals": {name: each.to_json() for name, each in found.items()},
        "versions": versions(),
        "seconds": round(time.time() - began, 3),
    }
    lines: list[dict[str, Any]] = [{"index": i, "id": item.record.id} for i, item in enumerate(items)]
    for each in left_out:
        lines[each.index]["left_out"] = each.why
    for record, answer, each in zip(records, given, scored, strict=True):
        lines[record.index] |= {**each.details, **_plain(answer), "figures": each.sums()}
    if job is not None and processes.first():
        job.write(results, lines)
    return Evaluation(results, lines)


def _stamp(
    bundle: Bundle,
    settings: EvaluationConfig,
    own: dict[str, Any],
    items: Sequence[Item],
    records: Sequence[Encoded],
) -> dict[str, Any]:
    """What the figures follow from. own: settings of the evaluator."""
    name_weights(bundle.folder)
    kind = type(settings.evaluator)
    labels = json_text([(item.record.id, item.record.responses, item.labels) for item in items])
    processor = bundle.processor.image_processor.to_json_string()
    data = {n: each for n, each in to_json(settings.data).items() if n not in settings.data.may_change}
    return {
        "evaluator": registered_name(kind) or part_name(kind) or kind.__qualname__,
        "config": own | {"seed": settings.seed, "data": data},
        "part_files": part_files(settings.evaluator) | part_files(settings.data),
        "fingerprint": bundle.folder.fingerprint,
        "trained": trained_digest(bundle.trained),
        "data_fingerprint": fingerprint(records, processor + labels),
        "dtype": str(bundle.dtype),
    }


def _answers(
    bundle: Bundle,
    encoder: Encoder,
    records: Sequence[Encoded],
    settings: EvaluationConfig,
    job: _Job | None,
) -> list[Answer]:
    """What the model says to each record, or its log-probs, those of an earlier start included."""
    found: dict[int, Answer] = {}
    for index, row in ({} if job is None else job.finished).items():
        found[index] = _read(row)
    todo = [record for record in records if record.index not in found]

    def keep(place: int, answer: Answer) -> None:
        found[todo[place].index] = answer
        if job is not None:
            job.add(todo[place].index, _plain(answer))

    def logps(place: int, values: tuple[np.ndarray, ...]) -> None:
        if all(np.isfinite(each).all() for each in values):
            keep(place, values)

    evaluator, size = settings.evaluator, settings.batch_size
    if todo and evaluator.needs == "logps":
        response_logps(bundle, encoder, todo, settings.data, size, what="log-probs", done=logps)
        broken = [record.record.id for record in todo if record.index not in found]
        if broken:
            raise not_finite("log-probs are", broken, len(records))
    elif todo:
        decoder = Generator(bundle, evaluator.sampling, size)

        def text(place: int, tokens: list[np.ndarray]) -> None:
            keep(place, encoder.text(tokens[0]).strip())

        respond(decoder, encoder, todo, evaluator.sampling, seed=settings.seed, done=text)
    return [found[record.index] for record in records]


def _plain(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"response": answer}
    return {"logps": [[float(value) for value in each] for each in answer]}


def _read(row: dict[str, Any]) -> Answer:
    if "response" in row:
        return row["response"]
    return tuple(np.array(each, np.float32) for each in row["logps"])


class _Job(PartFile):
    """Answers so far, and the files that come of them."""

    def __init__(self, out: Path, stamp: dict[str, Any], records: Sequence[Encoded]):
        lengths = {each.index: [len(ids) for ids in each.responses] for each in records}

        def complete(row: dict[str, Any]) -> bool:
            if not lengths[row["index"]]:
                return isinstance(row["response"], str)
            return [len(each) for each in row["logps"]] == lengths[row["index"]]

        super().__init__(out, "evaluation", stamp, lengths, complete)

    def start(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Read what an earlier run left; its results and lines, if it was complete."""
        if not self.out.exists():
            self.open()
            return None
        results = read_json(self.out, "give another --out or remove it")
        if any(results.get(name) != value for name, value in json.loads(json_text(self.stamp)).items()):
            raise refusal(
                str(self.out),
                "exists and is of another evaluation: its evaluator, settings, data or model differ",
                "give another --out or remove it",
            )
        self.part.unlink(missing_ok=True)
        beside = lines_beside(self.out)
        try:
            return results, [parse_json(line) for line in beside.read_bytes().splitlines()]
        except (OSError, ValueError) as error:
            problem = f"can't be read ({one_line(error, 200)})"
            raise refusal(
                str(beside), problem, f"remove it and {self.out}, and both are made again"
            ) from error

    def write(self, results: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
        with new_file(lines_beside(self.out)) as file:
            file.writelines(json_text(line) + "\n" for line in lines)
        with new_file(self.out) as file:
            file.write(json_text(results, indent=2) + "\n")
        self.part.unlink()


def _guarded(evaluator: Evaluator, call: Callable[[], T]) -> T:
    """What goes wrong in a user's evaluator is one line that names it."""
    name = part_name(type(evaluator))
    try:
        return call()
    except (InputError, NotFinite):
        raise
    except Exception as error:
        if name is None:
            raise
        said = f"{type(error).__name__}: {one_line(error, 300)}"
        raise InputError(f"evaluator {name} raises {said}; mend it") from error
