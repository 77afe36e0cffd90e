"""Benchmarks that a run asks its policy while it trains, on a part of their questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm_align.config import DataConfig
from mllm_align.config.checks import MANY, STEPS, check_number
from mllm_align.data.encode import Encoded, Encoder
from mllm_align.errors import InputError, refusal
from mllm_align.evaluation.base import (
    Context,
    EvaluationConfig,
    Evaluator,
    Item,
    check_scored,
    figures,
    open_evaluator,
)
from mllm_align.evaluation.compare import title_of
from mllm_align.evaluation.folders import place_among
from mllm_align.evaluation.judged import Judged
from mllm_align.evaluation.results import about, guarded
from mllm_align.evaluation.run import answers_of, questions
from mllm_align.models.bundle import Bundle
from mllm_align.prepare import prepare
from mllm_align.training.callbacks import Callback


class _Asked(NamedTuple):
    """A benchmark, and its questions as the model gets them."""

    settings: EvaluationConfig
    encoder: Encoder
    records: list[Encoded]
    items: list[Item]

    def figures(self, policy: Bundle) -> dict[str, float]:
        settings, evaluator, items = self.settings, self.settings.evaluator, self.items
        answers = answers_of(policy, self.encoder, self.records, settings)
        context = Context(policy, settings.data)
        scored = guarded(evaluator, lambda: list(evaluator.score_all(items, answers, context)))
        check_scored(evaluator, scored, items)
        return {name: each.mean for name, each in figures(evaluator, items, scored).items()}


class Benchmarks(Callback):
    """`train(..., callbacks=[Benchmarks(["pope", "chair"], "eval", every=200)])`: figures before the first
    step, every so many steps and after the last, as `pope/mean_f1`, in log.jsonl and the trackers.

    names: evaluators, or names of them or of a user's, `file.py:Name`. data: a folder with a subfolder for
    each, named like it, or what the only one takes. questions: how many of each are asked, drawn at random,
    the same every time; None for all. batch_size: images, or prompts without, at once. config: a
    DataConfig, how data are read; its chat template should be the run's. Raises InputError for what can't
    be used: names at once, data before training begins.
    """

    def __init__(
        self,
        names: Sequence[str | Evaluator],
        data: Any,
        every: int | None = None,
        *,
        questions: int | None = 200,
        batch_size: int = 8,
        seed: int = 0,
        config: DataConfig | None = None,
    ):
        if every is not None:
            check_number("evaluate_every", every, 1, STEPS)
        if questions is not None:
            check_number("evaluate_questions", questions, 1, MANY)
        self.policy_every, self.questions = every, questions
        more = {"data": config or DataConfig(), "batch_size": batch_size, "seed": seed}
        self._settings: dict[str, tuple[EvaluationConfig, Any]] = {}
        for each in names:
            settings = EvaluationConfig(open_evaluator(each), **more)
            name = title_of(about(settings, {})["benchmark"])
            if isinstance(settings.evaluator, Judged) and not settings.evaluator.scores_answers:
                problem = "needs a judge, which is not asked while training"
                raise InputError(f"{name} {problem}; evaluate checkpoints of the run with it")
            self._settings[name] = settings, _place(data, name, settings.evaluator)
        self._asked: dict[str, _Asked] = {}

    def on_start(self, bundle: Bundle) -> None:
        self._asked = {name: self._open(*each, bundle) for name, each in self._settings.items()}

    def _open(self, settings: EvaluationConfig, data: Any, bundle: Bundle) -> _Asked:
        evaluator, items = settings.evaluator, questions(settings, data)
        if self.questions is not None and len(items) > self.questions:
            draw = np.random.default_rng(settings.seed).choice(len(items), self.questions, replace=False)
            items = [items[i] for i in sorted(draw)]
        whole = replace(settings.data, max_records=None)
        encoder, records, _ = prepare(bundle, [item.record for item in items], whole, evaluator.given())
        return _Asked(settings, encoder, records, [items[record.index] for record in records])

    def on_policy(self, step: int, policy: Bundle) -> dict[str, float]:
        return {
            f"{name}/{figure}": value
            for name, each in self._asked.items()
            for figure, value in each.figures(policy).items()
        }

    def higher_is_better(self, figure: str) -> bool:
        name, _, rest = figure.partition("/")
        return self._settings[name][0].evaluator.way(rest) >= 0


def _place(data: Any, name: str, evaluator: Evaluator) -> Any:
    """The benchmark's own folder among others, or what is given where it has none there."""
    if not isinstance(data, str | Path):
        return data
    if not Path(data).exists():
        raise refusal(str(data), "is not there", "name the benchmarks' folder with --evaluate-data")
    return (Path(data).is_dir() and place_among(Path(data), name, type(evaluator))) or data
