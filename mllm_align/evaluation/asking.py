"""A judge is asked about answers, and its verdicts become figures.

While it is asked, verdicts are appended to OUT/reviews.jsonl.part in the benchmark's own names of fields,
so that the same command goes on where it was stopped. Every verdict is needed: without one there are no
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_align import processes
from mllm_align.annotate.judge import LocalModel
from mllm_align.config.parts import MeshConfig
from mllm_align.config.servers import BenchmarkJudge
from mllm_align.data.records import Message, Part, Record
from mllm_align.errors import InputError, first_few, refusal
from mllm_align.evaluation.base import Evaluator, Item
from mllm_align.evaluation.judged import Judged
from mllm_align.evaluation.results import REVIEWS, Evaluation, guarded
from mllm_align.evaluation.reviews import figures_of
from mllm_align.files import json_text
from mllm_align.part_file import PartFile
from mllm_align.progress import progress_bar

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mllm_align.models.bundle import Bundle

Keep = Callable[[int, str], None]


def about_judge(evaluator: Evaluator, items: Sequence[Item], judge: BenchmarkJudge) -> dict[str, Any]:
    """What verdicts follow from beside the answers: the judge, and what it is told. Raises InputError for
    an evaluator or data that have no question for a judge."""
    name = type(evaluator).__name__
    if not isinstance(evaluator, Judged):
        raise InputError(f"evaluator {name} asks no judge; leave out --judge.url and --judge.model")
    if type(evaluator).to_judge is Judged.to_judge:
        raise InputError(f"evaluator {name} has no to_judge(item, answer); give it one, or use --reviews")
    texts = guarded(evaluator, lambda: [evaluator.to_judge(item, "") for item in items])
    about: dict[str, Any] = {
        "max_tokens": judge.max_tokens,
        "runs": judge.runs,
        "questions": _digest(texts),
    }
    if judge.model is None:
        return {"name": judge.name, "temperature": judge.temperature, **about}
    from mllm_align.models.sources import open_model
    from mllm_align.prepare import name_weights

    folder = open_model(judge.model)
    name_weights(folder)
    return {"model": str(folder.path.resolve()), "fingerprint": folder.fingerprint, **about}


def judged(
    evaluator: Evaluator,
    items: Sequence[Item],
    answers: Sequence[Any],
    judge: BenchmarkJudge,
    stamp: Mapping[str, Any],
    began: float,
    out: Path | None,
    mesh: MeshConfig | Mesh,
    more: Mapping[str, Any],
) -> Evaluation:
    """Ask the judge about all answers, as often as it is to be asked, and score what it says. All processes
    call it together.

    stamp: what the figures follow from, with `about_judge` under "judge". out: the folder where verdicts
    are kept, until `results.drop_parts`; None keeps them in memory. mesh: of a judge's model. more: further
    fields of the results. Raises InputError, with what is kept, where verdicts are missing; and where none
    can be read.
    """
    assert isinstance(evaluator, Judged)  # about_judge refuses others
    pairs = list(zip(items, answers, strict=True))
    asked = guarded(evaluator, lambda: [_question(evaluator, item, answer) for item, answer in pairs])
    wanted = _Wanted(evaluator, items, asked, judge)
    kept = None
    if out is not None:
        kept = _Kept(out, {"config": stamp["judge"], "asked": _digest([q.text for q in asked])}, wanted)
        kept.begin()
    with nullcontext() if kept is None else kept:
        if judge.model is None:
            texts = processes.on_first(lambda: _from_endpoint(wanted, kept))
        else:
            texts = _from_model(wanted, kept, mesh)
    of_run = [
        [evaluator.review(item, text) for item, text in zip(items, each, strict=True)] for each in texts
    ]
    runs = [(judge.shown, rows) for rows in of_run]
    left = "" if kept is None else f", and remove {kept.part} to ask again"
    remedy = f"take a judge that keeps to the form it is asked for{left}"
    return figures_of(evaluator, items, runs, stamp, began, remedy, **more)


# ---- what is asked -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """One user turn: the images that the judge sees, and the text."""

    record: Record

    @property
    def text(self) -> str:
        return self.record.messages[0].text


def _question(evaluator: Judged, item: Item, answer: str) -> _Question:
    record, text = item.record, evaluator.to_judge(item, answer)
    images = record.images if evaluator.judge_sees else ()
    turn = Message("user", (*[Part()] * len(images), Part(text)))
    return _Question(Record(record.id, (turn,), (), images, record.where))


def _digest(texts: Sequence[str]) -> str:
    return sha256(json_text(texts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Wanted:
    """The verdicts that are wanted: of run r on question i, number r * n + i."""

    evaluator: Judged
    items: Sequence[Item]
    asked: Sequence[_Question]
    judge: BenchmarkJudge

    @property
    def count(self) -> int:
        return len(self.items) * self.judge.runs

    def row(self, number: int, text: str) -> dict[str, Any]:
        run, place = divmod(number, len(self.items))
        return {"run": run + 1, **self.evaluator.review(self.items[place], text)}

    def by_run(self, found: Mapping[int, str]) -> list[list[str]]:
        """Raises InputError where verdicts say nothing."""
        n = len(self.items)
        missing = [number for number in range(self.count) if number not in found]
        if missing:
            ids = first_few(list(dict.fromkeys(self.items[number % n].record.id for number in missing)))
            problem = f"said nothing about {len(missing)} of {self.count} answers: {ids}"
            remedy = "raise judge.max_tokens or ask another judge"
            raise refusal(self.judge.shown, problem, remedy)
        return [[found[run * n + place] for place in range(n)] for run in range(self.judge.runs)]


# ---- who is asked ------------------------------------------------------------------------------------


def _from_endpoint(wanted: _Wanted, kept: _Kept | None) -> list[list[str]]:
    """The texts of all verdicts, by runs."""
    from mllm_align.annotate.endpoint import EndpointClient

    n, found = len(wanted.items), _found(kept)
    spent = len(found)
    try:
        with progress_bar(wanted.count - len(found), "judging") as bar:
            for run in range(wanted.judge.runs):
                left = [place for place in range(n) if run * n + place not in found]
                keep = _keeper([run * n + place for place in left], found, kept, bar.update)
                # one of its own for each run: it asks the same question once
                client = EndpointClient(wanted.judge, None, spent=spent, every=True)
                client([wanted.asked[place] for place in left], keep)
                spent += client.sent
        return wanted.by_run(found)
    except InputError as error:
        raise _with_kept(error, found, wanted, kept) from error


def _from_model(wanted: _Wanted, kept: _Kept | None, mesh: MeshConfig | Mesh | None) -> list[list[str]]:
    """The same of a model, on all processes together."""
    from mllm_align.models.bundle import load

    judge, found = wanted.judge, _found(kept)

    def opened() -> Bundle:
        return load(str(judge.model), "auto", mesh)

    asker = LocalModel(opened, judge.max_tokens, judge.batch_size, progress="judging")
    left = [place for place in range(len(wanted.items)) if place not in found]
    try:
        said = asker([wanted.asked[place].record for place in left], _keeper(left, found, kept))
        long = [wanted.items[i].record.id for i, text in zip(left, said, strict=True) if text is None]
        if long:
            problem = f"{len(long)} of {wanted.count} questions are too long for it: {first_few(long)}"
            raise refusal(judge.shown, problem, "lower judge.max_tokens or ask another judge")
        return wanted.by_run(found)
    except InputError as error:
        raise _with_kept(error, found, wanted, kept) from error


def _keeper(
    numbers: Sequence[int],
    found: dict[int, str],
    kept: _Kept | None,
    tell: Callable[[int], Any] = lambda count: None,
) -> Keep:
    """Keeps a verdict that says something. numbers: which verdict each is. tell: of another that came."""

    def keep(place: int, text: str) -> None:
        tell(1)
        if not text.strip():
            return
        if kept is not None:
            kept.keep(numbers[place], text)
        found[numbers[place]] = text

    return keep


def _found(kept: _Kept | None) -> dict[int, str]:
    return {} if kept is None else {number: row["content"] for number, row in kept.finished.items()}


def _with_kept(
    error: InputError, found: Mapping[int, str], wanted: _Wanted, kept: _Kept | None
) -> InputError:
    """The error, and what becomes of the verdicts that came."""
    came, left = f"{len(found)} of {wanted.count} verdicts", wanted.count - len(found)
    if not found:
        return InputError(f"{error}; no verdict of {wanted.count} came")
    if kept is None:
        return InputError(f"{error}; {came} came, and are lost: name a folder with out")
    return InputError(f"{error}; kept: {came}, in {kept.part}; the same command asks for the other {left}")


class _Kept(PartFile):
    """Verdicts so far."""

    def __init__(self, out: Path, stamp: dict[str, Any], wanted: _Wanted):
        self.wanted = wanted

        def complete(row: dict[str, Any]) -> bool:
            item = wanted.items[row["index"] % len(wanted.items)]
            return isinstance(row["content"], str) and wanted.evaluator.review_key(row) == item.record.id

        super().__init__(out / REVIEWS, "reviews", stamp, range(wanted.count), complete)

    def begin(self) -> None:
        """Read, on all processes, what an earlier start left."""

        def read() -> list[dict[str, Any]]:
            self.open()
            return list(self.finished.values())

        self.finished = {row["index"]: row for row in processes.on_first(read)}

    def keep(self, number: int, text: str) -> None:
        self.add(number, self.wanted.row(number, text))

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            with suppress(OSError):  # a folder that nothing came into
                self.out.parent.rmdir()
