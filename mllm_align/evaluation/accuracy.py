"""How often an annotator agrees with a file of preference pairs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from mllm_align import processes
from mllm_align.annotate.factory import Context, open_annotator
from mllm_align.annotate.pairwise import Asked, Pairwise, read
from mllm_align.annotate.verdict import Question, Verdict, counted, rank
from mllm_align.config import JudgeConfig, to_json
from mllm_align.errors import InputError
from mllm_align.evaluation.intervals import Interval, bootstrap
from mllm_align.evaluation.run import Evaluation
from mllm_align.files import json_text, lines_beside
from mllm_align.models.bundle import Bundle, load
from mllm_align.prepare import read_data
from mllm_align.result_file import result
from mllm_align.training.run_model import open_base

UNREAD = """
No answer could be read, so nothing was measured:
{form}, and none is.
The annotator does not follow the instruction, which says nothing of the pairs. Its words are in the .jsonl
beside the result. Try a model that was tuned to follow instructions (--annotator.model, or --annotator
endpoint), a larger --annotator.max-tokens where answers are cut off, or a function of your own (--annotator
scorer)."""

CHOSEN, REJECTED = 0, 1  # places of the responses in a question
LEVEL = 0.95

# What a model was asked about a pair and what it said: is the chosen response shown first, its words.
Heard = list[tuple[bool, str | None]]


def judge(
    model: str | Path | Bundle | None,
    data: Any,
    config: JudgeConfig | None = None,
    *,
    out: str | Path | None = None,
) -> Evaluation:
    """How often an annotator prefers the chosen responses of preference pairs, asked in both orders.

    model: the policy's base: a Bundle, without what a run has trained over it, or what `train` takes; None
    unless the annotator is that. data: a
    data set in files, or rows. config: a JudgeConfig, `annotator` its first field, which may be an object
    of a class of your own; default: the policy's base judges. out: a file to write, JSON; its lines go
    beside it.

    Returns `results`, the figures (accuracy, accuracy_of_all, outcomes and more, each share with its
    interval) and `lines`, a dictionary for each record: index, id, outcome, right, scores, reason,
    answers. Raises InputError for data, a model or an annotator that can't be used, NotFinite where
    logits of a model that answers are not finite.
    """
    config = config or JudgeConfig()
    asked, named = config.annotator.asks_base, str(model)
    if asked and model is None:
        raise InputError("judge needs --model: the annotator is the policy's own base")
    with ExitStack() as stack:
        if out is not None:  # refused before the work, not after
            place = Path(out)
            files = [stack.enter_context(result(each, data)) for each in (lines_beside(place), place)]
        base = None
        if isinstance(model, Bundle):
            base, named = model, str(model.folder.named or model.folder.path)
        elif asked and model is not None:  # a run's policy, as it would be the base of another
            base = load(open_base(model), config.dtype, config.mesh)
        answers = None if out is None else Path(out).with_suffix(".answers")
        summary, lines = accuracy(config, data, base, answers)
        about = {"data": str(data) if isinstance(data, str | Path) else None}
        results = about | {"model": named if asked else None} | summary
        if out is not None:
            files[0].writelines(json_text(line) + "\n" for line in lines)
            files[1].write(json_text(results, indent=2) + "\n")
    return Evaluation(results, lines)


def accuracy(
    config: JudgeConfig, data: Any, base: Bundle | None = None, folder: Path | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask the annotator about every pair: what comes of it, and a line for each record.

    data: a file or rows of preference pairs; further responses are not looked at. base: the policy's, if
    the annotator is that. folder: where answers of an endpoint are kept. Several processes give the same.
    Raises InputError for data, or an annotator, that can't be used, NotFinite where logits of a model that
    answers are not finite.
    """
    began, asked = time.perf_counter(), config.annotator
    records = read_data(data, config.data, responses=2)
    questions = [Question(record, record.responses[:2]) for record in records]
    verdicts, heard = _asked(config, questions, base, folder)
    lines = [
        _line(index, question, verdict, said)
        for index, (question, verdict, said) in enumerate(zip(questions, verdicts, heard, strict=True))
    ]
    try:
        about = to_json(asked)
    except InputError:  # a class of a notebook, which no file names
        about = {"kind": type(asked).__qualname__, **asdict(asked)}
    summary = {"annotator": about, **measured(verdicts, heard)}
    return summary | {"seconds": round(time.perf_counter() - began, 3)}, lines


def _asked(
    config: JudgeConfig, questions: Sequence[Question], base: Bundle | None, folder: Path | None
) -> tuple[list[Verdict], list[Heard]]:
    """Verdicts, and what was heard in each order if two are shown. One process asks, unless the devices
    of all answer."""
    annotator = config.annotator.on_mesh(config.mesh)

    def ask() -> tuple[list[dict[str, Any]], list[Heard]]:
        asks = open_annotator(annotator, Context(base, folder, config.data, "judging"))
        said: list[tuple[Asked, str | None]] = []
        if isinstance(asks, Pairwise):
            asks = _overheard(asks, said)
        verdicts = rank(asks, questions)
        return [asdict(verdict) for verdict in verdicts], _by_record(questions, said)

    verdicts, heard = ask() if annotator.on_devices else processes.on_first(ask)
    # what comes from another process has lists for tuples
    return (
        [Verdict.from_json(each) for each in verdicts],
        [[(shown, text) for shown, text in each] for each in heard],
    )


def _overheard(pairwise: Pairwise, said: list[tuple[Asked, str | None]]) -> Pairwise:
    """The same, with each comparison and its answer put down in `said`."""

    def ask(asked: Sequence[Asked]) -> list[str | None]:
        answers = pairwise.ask(asked)
        said.extend(zip(asked, answers, strict=True))
        return answers

    return Pairwise(ask)


def _by_record(questions: Sequence[Question], said: Sequence[tuple[Asked, str | None]]) -> list[Heard]:
    heard: dict[str, Heard] = {question.record.id: [] for question in questions}
    for asked, text in said:
        heard[asked.record.id].append((asked.first == asked.record.responses[CHOSEN], text))
    return [heard[question.record.id] for question in questions]


def _right(verdict: Verdict) -> bool | None:
    """Whether the chosen response won; None where none did."""
    return None if verdict.pair is None else verdict.pair == (CHOSEN, REJECTED)


def _line(index: int, question: Question, verdict: Verdict, heard: Heard) -> dict[str, Any]:
    return {
        "index": index,
        "id": question.record.id,
        "outcome": verdict.outcome,
        "right": _right(verdict),
        "scores": list(verdict.scores) or None,
        "reason": verdict.reason,
        "answers": {_order(chosen_first): text for chosen_first, text in heard} or None,
    }


def _order(chosen_first: bool) -> str:
    return "chosen_first" if chosen_first else "rejected_first"


# ---- figures -----------------------------------------------------------------------------------------


def measured(verdicts: Sequence[Verdict], heard: Sequence[Heard]) -> dict[str, Any]:
    """The figures, each with its bootstrap interval over pairs.

    accuracy: of the pairs with a winner, the share where it is the chosen response; accuracy_of_all counts
    the others as wrong. orders: of the answers that take a side, the share that takes the chosen response,
    for each order. first: of the same answers, the share that takes the response shown first. The two are
    None where no orders are shown. apart_from_chance: see `_apart`.
    """
    right = [_right(verdict) for verdict in verdicts]
    decided = [each for each in right if each is not None]
    ends = bootstrap(np.array(decided, np.float64))
    return {
        "pairs": len(verdicts),
        "decided": len(decided),
        "right": sum(decided),
        "outcomes": counted(verdicts),
        "accuracy": ends.to_json(),
        "accuracy_of_all": bootstrap(np.array([each is True for each in right], np.float64)).to_json(),
        **_apart(decided, ends),
        "orders": _orders(heard) if any(heard) else None,
        "first": _share([(v.first, v.parsed) for v in verdicts]) if any(heard) else None,
        "first_expected": 0.5 if any(heard) else None,
    }


def _apart(decided: Sequence[bool], ends: Interval) -> dict[str, Any]:
    """Whether the accuracy can be told from 1/2: its interval leaves that out, and an exact binomial test
    agrees, as the bootstrap's interval is too narrow for a few pairs that are all alike."""
    p = float(binomtest(sum(decided), len(decided)).pvalue) if decided else 1.0
    outside = not math.isnan(ends.low) and not ends.low <= 0.5 <= ends.high
    return {"apart_from_chance": outside and p < 1 - LEVEL, "p_of_chance": p}


def _orders(heard: Sequence[Heard]) -> dict[str, Any]:
    """How each order did: the share of its answers for the chosen response, of those that take a side."""
    return {_order(shown): _share([_votes(each, shown) for each in heard]) for shown in (True, False)}


def _votes(heard: Heard, chosen_first: bool) -> tuple[int, int]:
    """Of one pair in one order: answers for the chosen response, and answers for either."""
    taken = [read(text) for shown, text in heard if shown == chosen_first and text is not None]
    chosen, rejected = (1, 2) if chosen_first else (2, 1)
    return taken.count(chosen), taken.count(chosen) + taken.count(rejected)


def _share(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The share of all second numbers that the first ones make, with its interval over pairs."""
    some = np.array([each for each in counts if each[1]], np.float64).reshape(-1, 2)
    found = bootstrap(some, lambda means: means[..., 0] / means[..., 1])
    return found.to_json() | {"n": int(some[:, 1].sum())}


def table(summary: dict[str, Any]) -> str:
    """The figures as they are printed."""
    outcomes = ", ".join(f"{number} {name}" for name, number in summary["outcomes"].items() if number)
    rows = [
        ("pairs", f"{summary['pairs']}: {outcomes}"),
        ("accuracy of decided", f"{_figure(summary['accuracy'])}; {summary['right']} right"),
        ("accuracy of all", f"{_figure(summary['accuracy_of_all'])}; undecided count as wrong"),
        ("told from chance", _chance(summary)),
    ]
    if summary["orders"] is not None:
        rows += [(f"right, {name.replace('_', ' ')}", _figure(o)) for name, o in summary["orders"].items()]
        rows.append(("takes the first", f"{_figure(summary['first'])}; 0.5 without position bias"))
    rows.append(("seconds", f"{summary['seconds']:.1f}"))
    return "\n".join([f"{name:22}{text}" for name, text in rows] + _unread(summary))


def _unread(summary: dict[str, Any]) -> list[str]:
    """What it means, and what to try, where all answers were unparsable."""
    count = summary["outcomes"]
    asked = summary["pairs"] - count["identical"] - count["empty"]
    if not asked or count["unparsable"] < asked:
        return []
    form = "an answer must begin with yes or no"
    if summary["orders"] is not None:
        form = 'the first line of an answer must be "Response 1", "Response 2" or "Tie"'
    return [UNREAD.format(form=form)]


def _figure(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "none"
    ends = "no interval" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}"
    return f"{found['mean']:.3f} ({ends}) of {found['n']}"


def _chance(summary: dict[str, Any]) -> str:
    answer = "no"
    if summary["apart_from_chance"]:
        answer = f"yes, {'better' if summary['accuracy']['mean'] > 0.5 else 'worse'}"
    return f"{answer} (p = {summary['p_of_chance']:.2g})"
