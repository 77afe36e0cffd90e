"""An evaluation: the model is asked once, its answers are scored, figures and lines are written.

While it runs, answers are appended to OUT/answers.jsonl.part, so that the same command goes on where it was
stopped. At the end OUT/results.json has the figures, with the settings and fingerprints that they follow
from, and OUT/answers.jsonl a line for each record. A judge is asked once all answers are there
(`evaluation/asking.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align import processes
from mllm_align.config import DataConfig, to_json
from mllm_align.config.servers import BenchmarkJudge
from mllm_align.data.encode import Encoded, Encoder, fingerprint
from mllm_align.errors import InputError, first_few, not_finite
from mllm_align.evaluation.asking import about_judge, judged
from mllm_align.evaluation.base import (
    Answer,
    Context,
    EvaluationConfig,
    Evaluator,
    Item,
    Rewards,
    check_items,
    check_scored,
    open_evaluator,
)
from mllm_align.evaluation.results import (
    ANSWERS,
    REVIEWS,
    Evaluation,
    about,
    check_folder,
    drop_parts,
    guarded,
    read_finished,
    record_of,
    results_of,
    write,
    write_lines,
)
from mllm_align.files import json_text
from mllm_align.generation.bdhs_job import trained_digest
from mllm_align.generation.decode import Generator
from mllm_align.generation.respond import respond
from mllm_align.locks import alone
from mllm_align.models.bundle import Bundle, opened
from mllm_align.part_file import PartFile, tell_finished
from mllm_align.prepare import check_batch, name_weights, prepare
from mllm_align.scoring import response_logps, response_rewards
from mllm_align.training.run_facts import versions


def evaluate(
    model: str | Path | Bundle | Callable[[], Bundle],
    data: Any,
    evaluator: Evaluator | str,
    *,
    out: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    config: DataConfig | None = None,
    judge: BenchmarkJudge | None = None,
) -> Evaluation:
    """Ask a model about all records and score its answers.

    model: a Bundle, what `load` takes (a model, or a run's folder), or a function that opens it once the
    data is known to be there. data: what the evaluator takes; by default as `train` takes it. evaluator: an
    object, or the name of one or of a user's, `file.py:Name`, with its default settings. out: a folder to
    write. config: a DataConfig, how data are read. judge: a BenchmarkJudge, who rates the answers, for a
    `Judged` evaluator. The same call goes on where it was stopped, and reads `out` where it is done.

    Returns an Evaluation: figures with their intervals, and a line for each record, or for each verdict.
    Raises InputError for data or an evaluator that can't be used, an `out` of something else and a judge
    that falls silent; NotFinite where numbers of some records are not finite, after all others, whose
    answers are kept.
    """
    asked = open_evaluator(evaluator)
    more = {"data": config or DataConfig(), "judge": judge or BenchmarkJudge()}
    settings = EvaluationConfig(asked, batch_size=batch_size, seed=seed, **more)
    if out is None:
        return answered(model, questions(settings, data), data, settings, None)
    check_folder(Path(out))
    with alone(Path(out)):
        return answered(model, questions(settings, data), data, settings, Path(out))


def questions(settings: EvaluationConfig, data: Any) -> list[Item]:
    """What a model is asked. Raises InputError for data that can't be used, and missing images."""
    evaluator, config = settings.evaluator, settings.data
    items = guarded(
        evaluator, lambda: check_items(evaluator, evaluator.asked(evaluator.items(data, config)))
    )
    check_images(items)
    return items


def answered(
    model: str | Path | Bundle | Callable[[], Bundle],
    items: list[Item],
    data: Any,
    settings: EvaluationConfig,
    out: Path | None,
) -> Evaluation:
    """What `evaluate` gives of these questions, in a folder that the caller has checked and locked. data:
    what they were read from, for the results."""
    began, evaluator, config = time.time(), settings.evaluator, settings.data
    judge = about_judge(evaluator, items, settings.judge) if settings.judge.given else None
    bundle = model() if callable(model) else opened(model)
    whole = replace(config, max_records=None)  # items may be several of a record
    encoder, records, left_out = prepare(bundle, [item.record for item in items], whole, evaluator.given())
    check_batch(settings.batch_size, len(records))
    # only what is written must be found again by its name: in memory, any class will do
    own = asdict(evaluator) if out is None else to_json(evaluator)
    stamp = _stamp(bundle, settings, own, items, records)
    whole_stamp = stamp if judge is None else stamp | {"judge": judge}
    job = None if out is None else _Job(out, stamp, whole_stamp, records)
    if out is not None and job is not None:
        begun = processes.on_first(lambda: {"done": job.start(), "finished": [*job.finished.values()]})
        if begun["done"] is not None:
            tell_finished(out)
            return Evaluation(*begun["done"])
        job.finished = {row["index"]: row for row in begun["finished"]}
    with nullcontext() if job is None else job:
        given = answers_of(bundle, encoder, records, settings, job)
    asked = [items[each.index] for each in records]
    source = str(data) if isinstance(data, str | Path) else None
    more: dict[str, Any] = {"model": str((bundle.folder.named or bundle.folder.path).resolve())}
    more |= {"left_out": len(left_out), "data": source}
    lines: list[dict[str, Any]] = [{"index": i, "id": item.record.id} for i, item in enumerate(items)]
    for each in left_out:
        lines[each.index]["left_out"] = each.why
    for record, answer in zip(records, given, strict=True):
        item = items[record.index]
        said = {"id": item.record.id, **_plain(answer)}
        if isinstance(answer, str):
            said = evaluator.row(item, answer)
        lines[record.index] = {"index": record.index, **said, "record": record_of(evaluator, item)}
    if judge is not None:
        rest = (settings.judge, whole_stamp, began, out, bundle.mesh, more)
        found = judged(evaluator, asked, given, *rest)
        if job is not None and processes.first():
            job.write(found.results, lines, found.lines)
        return found
    context = Context(bundle, config, None if out is None else out / "judge")
    scored = guarded(evaluator, lambda: list(evaluator.score_all(asked, given, context)))
    check_scored(evaluator, scored, asked)
    more |= {"versions": versions() | evaluator.versions(), "seconds": round(time.time() - began, 3)}
    results = results_of(evaluator, asked, scored, stamp, **more)
    for record, each in zip(records, scored, strict=True):
        lines[record.index] |= {**each.details, "figures": each.sums()}
    if job is not None and processes.first():
        job.write(results, lines)
    return Evaluation(results, lines)


def check_images(items: Sequence[Item]) -> None:
    """Raises InputError, with a count, where images are missing."""
    paths = dict.fromkeys(image.path for item in items for image in item.record.images if image.path)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = first_few([path.name for path in missing])
        where = f"{missing[0].parent}: {len(missing)} of {len(paths)} images are missing: {names}"
        raise InputError(f"{where}; put them there, or name their folder with --data.image-root")


def _stamp(
    bundle: Bundle,
    settings: EvaluationConfig,
    own: dict[str, Any],
    items: Sequence[Item],
    records: Sequence[Encoded],
) -> dict[str, Any]:
    """What the figures follow from. own: settings of the evaluator."""
    name_weights(bundle.folder)
    labels = json_text([(item.record.id, item.record.responses, item.labels) for item in items])
    processor = bundle.processor.image_processor.to_json_string()
    return about(settings, own) | {
        "fingerprint": bundle.folder.fingerprint,
        "trained": trained_digest(bundle.trained),
        "data_fingerprint": fingerprint(records, processor + labels),
        "dtype": str(bundle.dtype),
    }


def answers_of(
    bundle: Bundle,
    encoder: Encoder,
    records: Sequence[Encoded],
    settings: EvaluationConfig,
    job: _Job | None = None,
) -> list[Answer]:
    """What the model says to each record, or its log-probs, those of an earlier start included."""
    found: dict[int, Answer] = {}
    for index, row in ({} if job is None else job.finished).items():
        found[index] = _read(row)
    left = {place: record for place, record in enumerate(records) if record.index not in found}
    todo = list(left.values())

    def keep(record: Encoded, answer: Answer) -> None:
        found[record.index] = answer
        if job is not None:
            job.add(record.index, _plain(answer))

    def logps(place: int, values: tuple[np.ndarray, ...]) -> None:
        if all(np.isfinite(each).all() for each in values):
            keep(records[place], values)

    def rewards(place: int, values: np.ndarray) -> None:
        if np.isfinite(values).all():
            keep(records[place], Rewards(values, list(map(len, records[place].responses))))

    evaluator, size = settings.evaluator, settings.batch_size
    if todo and evaluator.needs != "responses":
        asked = bundle, encoder, records, settings.data, size
        if evaluator.needs == "logps":
            response_logps(*asked, what="log-probs", done=logps, wanted=left)
        else:
            response_rewards(*asked, what="rewards", done=rewards, wanted=left)
        broken = [record.record.id for record in todo if record.index not in found]
        if broken:
            what = "log-probs are" if evaluator.needs == "logps" else "rewards are"
            raise not_finite(what, broken, len(records))
    elif todo:
        decoder = Generator(bundle, evaluator.sampling, size)

        def text(place: int, tokens: list[np.ndarray]) -> None:
            keep(todo[place], encoder.text(tokens[0]).strip())

        respond(decoder, encoder, todo, evaluator.sampling, seed=settings.seed, done=text)
    return [found[record.index] for record in records]


def _plain(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"response": answer}
    if isinstance(answer, Rewards):
        return {"rewards": [float(each) for each in answer.rewards], "tokens": list(answer.tokens)}
    return {"logps": [[float(value) for value in each] for each in answer]}


def _read(row: dict[str, Any]) -> Answer:
    if "response" in row:
        return row["response"]
    if "rewards" in row:
        return Rewards(row["rewards"], row["tokens"])
    return tuple(np.array(each, np.float32) for each in row["logps"])


class _Job(PartFile):
    """Answers so far, and the files that come of them."""

    def __init__(self, out: Path, stamp: dict[str, Any], whole: dict[str, Any], records: Sequence[Encoded]):
        """stamp: what answers follow from. whole: what the figures do."""
        lengths = {each.index: [len(ids) for ids in each.responses] for each in records}

        def complete(row: dict[str, Any]) -> bool:
            if not lengths[row["index"]]:
                return isinstance(row["response"], str)
            if "rewards" in row:
                return row["tokens"] == lengths[row["index"]] and len(row["rewards"]) == len(row["tokens"])
            return [len(each) for each in row["logps"]] == lengths[row["index"]]

        self.folder, self.whole = out, whole
        super().__init__(out / ANSWERS, "evaluation", stamp, lengths, complete)

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            with suppress(OSError):  # a folder that nothing came into
                self.folder.rmdir()

    def start(self) -> Evaluation | None:
        """Read what an earlier run left; its results and lines, if it was complete."""
        done = read_finished(self.folder, self.whole, REVIEWS if "judge" in self.whole else ANSWERS)
        if done is None:
            self.open()
        else:
            drop_parts(self.folder)
        return done

    def write(
        self,
        results: dict[str, Any],
        lines: Sequence[dict[str, Any]],
        reviews: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """lines: of the answers. reviews: those of a judge's verdicts."""
        if reviews is None:
            write(self.folder, results, lines)
        else:
            write_lines(self.folder / ANSWERS, lines)
            write(self.folder, results, reviews, REVIEWS)
        drop_parts(self.folder)
