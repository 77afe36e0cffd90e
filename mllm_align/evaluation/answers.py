"""Answers that exist are scored: a file of them, joined with a benchmark's questions by their names.

No model is needed, and JAX does not start, unless a judge is asked.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mllm_align.config import DataConfig, MeshConfig, to_json
from mllm_align.config.servers import BenchmarkJudge
from mllm_align.errors import InputError, first_few, one_line, quoted, refusal
from mllm_align.evaluation.base import (
    Context,
    EvaluationConfig,
    Evaluator,
    Item,
    check_items,
    check_scored,
    open_evaluator,
)
from mllm_align.evaluation.judged import Judged
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
from mllm_align.files import json_text, parse_json
from mllm_align.training.run_facts import versions


def score_answers(
    answers: str | Path,
    data: Any,
    evaluator: Evaluator | str,
    *,
    out: str | Path | None = None,
    config: DataConfig | None = None,
    judge: BenchmarkJudge | None = None,
    mesh: MeshConfig | None = None,
) -> Evaluation:
    """Score a file of answers: JSON lines, or a JSON list, in the benchmark's own names of fields.

    data, evaluator, config, judge: as `evaluate` takes them. out: a folder to write. mesh: of a judge's
    model. Raises InputError for answers that don't join with the data: of other questions, doubled,
    missing.
    """
    opened = open_evaluator(evaluator)
    where = {"data": config or DataConfig(), "mesh": mesh or MeshConfig()}
    settings = EvaluationConfig(opened, judge=judge or BenchmarkJudge(), **where)
    folder = None if out is None else Path(out)
    if folder is None or not settings.judge.given:
        return _score_answers(Path(answers), data, settings, folder)
    check_folder(folder)
    from mllm_align.locks import alone

    with alone(folder):
        return _score_answers(Path(answers), data, settings, folder)


def _score_answers(file: Path, data: Any, settings: EvaluationConfig, out: Path | None) -> Evaluation:
    began, opened = time.time(), settings.evaluator
    if opened.needs != "responses":
        what = {"logps": "log-probs"}.get(opened.needs, opened.needs)
        raise InputError(f"evaluator {type(opened).__name__} needs {what}; give --model, not --answers")
    if isinstance(opened, Judged) and not (settings.judge.given or opened.scores_answers):
        problem = f"evaluator {type(opened).__name__} scores a judge's verdicts on answers"
        raise InputError(f"{problem}; name one with --judge.url or --judge.model, or give --reviews")
    if out is not None:
        check_folder(out)
    rows = _rows(file)
    items = guarded(opened, lambda: check_items(opened, opened.items(data, settings.data)))
    joined = join(opened, items, rows, str(file))
    asked, given = [item for item, _ in joined], [row for _, row in joined]
    texts = [row[opened.fields[1]] for row in given]
    stamp = about(settings, to_json(opened)) | {
        "answers_fingerprint": sha256(file.read_bytes()).hexdigest()[:16],
        "data_fingerprint": fingerprint_of(items),
    }
    source = str(data) if isinstance(data, str | Path) else None
    more: dict[str, Any] = {"answers": str(file), "data": source}
    more["prompt"] = None  # that is not known
    lines = [{"index": index, **row} for index, row in enumerate(given)]
    if settings.judge.given:
        return _judged(settings, asked, texts, lines, stamp, began, out, more)
    done = None if out is None else read_finished(out, stamp)
    if done is not None:
        return done
    context = Context(None, settings.data, None if out is None else out / "judge")
    scored = guarded(opened, lambda: list(opened.score_all(asked, texts, context)))
    check_scored(opened, scored, asked)
    more |= {"versions": versions() | opened.versions(), "seconds": round(time.time() - began, 3)}
    results = results_of(opened, asked, scored, stamp, **more)
    for line, item, each in zip(lines, asked, scored, strict=True):
        line |= {**each.details, "figures": each.sums(), "record": record_of(opened, item)}
    if out is not None:
        write(out, results, lines)
    return Evaluation(results, lines)


def _judged(
    settings: EvaluationConfig,
    items: Sequence[Item],
    texts: Sequence[str],
    lines: Sequence[dict[str, Any]],
    stamp: dict[str, Any],
    began: float,
    out: Path | None,
    more: dict[str, Any],
) -> Evaluation:
    """The judge is asked; here JAX does start."""
    from mllm_align import processes
    from mllm_align.evaluation.asking import about_judge, judged
    from mllm_align.evaluation.run import check_images

    evaluator, judge = settings.evaluator, settings.judge
    stamp = stamp | {"judge": about_judge(evaluator, items, judge)}
    if getattr(evaluator, "judge_sees", False):
        check_images(items)
    done = None if out is None else read_finished(out, stamp, REVIEWS)
    if done is not None:
        return done
    found = judged(evaluator, items, texts, judge, stamp, began, out, settings.mesh, more)
    if out is not None and processes.first():
        write_lines(out / ANSWERS, lines)
        write(out, *found, REVIEWS)
        drop_parts(out)
    return found


def join(
    evaluator: Evaluator, items: Sequence[Item], rows: Sequence[dict[str, Any]], where: str
) -> list[tuple[Item, dict[str, Any]]]:
    """The items with their rows of answers, in the order of the items.

    Raises InputError, with a count and names, for answers without an item or of another question, doubled
    ones, and items without an answer unless the evaluator is `partial`.
    """
    name, field = evaluator.fields
    found: dict[str, dict[str, Any]] = {}
    keys: list[str] = []
    known = {item.record.id: item for item in items}
    others = []
    for number, row in enumerate(rows, 1):
        at = f"{where} answer {number}"
        try:
            key = evaluator.key(row)
        except (KeyError, ValueError, IndexError) as error:
            raise refusal(at, f"says nothing of its question ({name})", "give it") from error
        text = row.get(field)
        if not isinstance(text, str):
            kind = "is missing" if text is None else f"is a {type(text).__name__}"
            raise refusal(f"{at}, {field}", kind, "give the text of the answer")
        keys.append(key)
        found[key] = row
        if key in known and not same_question(known[key], row):
            others.append(key)
    doubled = [key for key, count in Counter(keys).items() if count > 1]
    strange = [key for key in found if key not in known]
    missing = [] if evaluator.partial else [key for key in known if key not in found]
    faults = [
        (doubled, "ids come several times", "keep one answer to each question"),
        (strange, "answers are to no question of the data", "give the answers to these questions"),
        (others, "answers are to other questions of the same ids", "give the answers to these questions"),
        (missing, f"of {len(known)} questions have no answer", "answer them, too"),
    ]
    refuse(where, faults)
    return [(item, found[key]) for key, item in known.items() if key in found]


def same_question(item: Item, row: dict[str, Any]) -> bool:
    """Whether question and image are the item's, where the row has them."""
    asked, image = row.get("prompt") or row.get("question"), row.get("image")
    question = item.labels.get("question")
    if isinstance(asked, str) and question and _words(question) not in _words(asked):
        return False
    pictures = [each.path.name for each in item.record.images if each.path is not None]
    return not (isinstance(image, str) and pictures and Path(image).name not in pictures)


def _words(text: str) -> str:
    return " ".join(text.lower().split())


def _rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a file, or the values of its list."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise refusal(str(file), f"can't be read ({error.strerror})", "give a file of answers") from error
    whole = text.lstrip().startswith(b"[")
    pieces = [text] if whole else text.splitlines()
    rows: list[Any] = []
    for number, piece in enumerate(pieces, 1):
        if not piece.strip():
            continue
        try:
            value = parse_json(piece)
        except ValueError as error:
            at = str(file) if whole else f"{file} line {number}"
            raise refusal(at, f"is not JSON ({one_line(error, 200)})", "correct it") from error
        rows += value if whole else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise refusal(f"{file} answer {number}", f"is {quoted(row)}", "give an object with fields")
    if not rows:
        raise refusal(str(file), "has no answers", "give at least one")
    return rows


def refuse(where: str, faults: Sequence[tuple[Sequence[str], str, str]]) -> None:
    """Raises InputError for the first fault that has names, which it counts: (names, problem, remedy)."""
    for names, problem, remedy in faults:
        if names:
            raise refusal(where, f"{len(names)} {problem}: {first_few(names)}", remedy)


def fingerprint_of(items: Sequence[Item]) -> str:
    """A digest of all that scoring follows from."""
    records = [(item.record, item.labels) for item in items]
    content = [
        (record.id, [message.text for message in record.messages], record.responses, labels)
        for record, labels in records
    ]
    return sha256(json_text(content).encode()).hexdigest()
