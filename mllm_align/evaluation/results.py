"""What an evaluation writes: OUT/results.json has its figures, OUT/answers.jsonl a line for each record, or
OUT/reviews.jsonl one for each verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mllm_align.config import part_files, to_json
from mllm_align.errors import InputError, NotFinite, one_line, refusal
from mllm_align.evaluation.base import EvaluationConfig, Evaluator, Item, Scored, figures
from mllm_align.files import json_text, new_file, parse_json, read_json
from mllm_align.registry import part_name, registered_name

T = TypeVar("T")
RESULTS, ANSWERS, REVIEWS = "results.json", "answers.jsonl", "reviews.jsonl"


class Evaluation(NamedTuple):
    """results: settings, fingerprints, `scores` and `intervals` by the names of the figures. lines: a
    dictionary for each record, or for each verdict."""

    results: dict[str, Any]
    lines: list[dict[str, Any]]


def about(settings: EvaluationConfig, own: dict[str, Any]) -> dict[str, Any]:
    """What the figures follow from, of the settings. own: those of the evaluator."""
    kind = type(settings.evaluator)
    data = {n: each for n, each in to_json(settings.data).items() if n not in settings.data.may_change}
    return {
        "benchmark": registered_name(kind) or part_name(kind) or kind.__qualname__,
        "config": own | {"seed": settings.seed, "data": data},
        "part_files": part_files(settings.evaluator) | part_files(settings.data),
    }


def results_of(
    evaluator: Evaluator,
    items: Sequence[Item],
    scored: Sequence[Scored],
    stamp: Mapping[str, Any],
    *,
    again: Sequence[Sequence[Scored]] = (),
    **more: Any,
) -> dict[str, Any]:
    """The content of results.json. stamp: what the figures follow from. again: scores of further runs.
    more: further fields."""
    found = figures(evaluator, items, scored, *again)
    return {
        "benchmark": stamp["benchmark"],
        "model": None,
        "fingerprint": None,
        "prompt": getattr(evaluator, "prompt", None),
        "preset": getattr(evaluator, "preset", None),
        "n": len(items),
        "scores": _nested({name: each.mean for name, each in found.items()}),
        "intervals": _nested({name: each.to_json() for name, each in found.items()}),
        **more,
        **stamp,
    }


def _nested(found: Mapping[str, Any]) -> dict[str, Any]:
    """`a/b` as b within a."""
    out: dict[str, Any] = {}
    for name, value in found.items():
        *groups, last = name.split("/")
        inside = out
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[last] = value
    return out


def record_of(evaluator: Evaluator, item: Item) -> dict[str, Any]:
    """What a line says of its record, for pages and comparisons: id, group of the bootstrap, question, and
    files of its images."""
    question = item.labels.get("question") or item.record.messages[-1].text
    images = [str(image.path.absolute()) for image in item.record.images if image.path is not None]
    return {"id": item.record.id, "group": evaluator.group(item), "question": question, "images": images}


def table(intervals: Mapping[str, Any], group: str = "") -> list[str]:
    """The figures as they are printed, a line each."""
    lines = []
    for name, each in intervals.items():
        if "mean" not in each or isinstance(each["mean"], Mapping):
            lines += table(each, f"{group}{name} ")
            continue
        ends = "" if each["low"] is None else f" ({each['low']:.4f} to {each['high']:.4f})"
        lines.append(f"{group + name + ' ':24}{each['mean']:.4f}{ends} of {each['n']}")
    return lines


def guarded(evaluator: Evaluator, call: Callable[[], T]) -> T:
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


# ---- the folder --------------------------------------------------------------------------------------


def check_folder(out: Path) -> None:
    """Raises InputError where `out` can't be, or holds answers or verdicts that are not ours."""
    if out.exists() and not out.is_dir():
        raise refusal(str(out), "this is a file", "name a folder with --out")
    begun = any(file.exists() for file in (out / RESULTS, *_parts(out)))
    for file in (out / ANSWERS, out / REVIEWS):
        if file.exists() and not begun:
            problem = f"is there without {RESULTS}, so it is not ours"
            raise refusal(str(file), problem, "give another --out")


def read_finished(out: Path, stamp: Mapping[str, Any], name: str = ANSWERS) -> Evaluation | None:
    """What an earlier evaluation left, if it was complete. name: the file of its lines. Raises InputError
    for another's."""
    if not (out / RESULTS).exists():
        return None
    results = read_json(out / RESULTS, "give another --out or remove it")
    if any(results.get(name) != value for name, value in json.loads(json_text(stamp)).items()):
        raise refusal(
            str(out),
            "is of another evaluation: its evaluator, settings, data, model or answers differ",
            "give another --out or remove it",
        )
    lines = out / name
    try:
        return Evaluation(results, [parse_json(line) for line in lines.read_bytes().splitlines()])
    except (OSError, ValueError) as error:
        problem = f"can't be read ({one_line(error, 200)})"
        raise refusal(str(lines), problem, f"remove {out}, and it is made again") from error


def write(
    out: Path, results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], name: str = ANSWERS
) -> None:
    """Both files, the figures last: where they are, all is there. name: the file of the lines."""
    write_lines(out / name, lines)
    with new_file(out / RESULTS) as file:
        file.write(json_text(results, indent=2) + "\n")


def write_lines(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with new_file(out) as file:
        file.writelines(json_text(line) + "\n" for line in lines)


def drop_parts(out: Path) -> None:
    """Remove what was kept on the way to the results."""
    for part in _parts(out):
        part.unlink(missing_ok=True)


def _parts(out: Path) -> list[Path]:
    return [out / f"{name}.part" for name in (ANSWERS, REVIEWS)]
