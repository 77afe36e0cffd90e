"""`mllm-align evaluate`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import Data, PrintConfig, begin, tell
from mllm_align.errors import InputError
from mllm_align.evaluation.base import EVALUATORS, EvaluationConfig, Evaluator, SuiteConfig
from mllm_align.evaluation.compare import read_evaluation, title_of
from mllm_align.evaluation.judged import Judged
from mllm_align.evaluation.results import ANSWERS, REVIEWS, Evaluation, table

ALL = "all"


@dataclass(frozen=True)
class Evaluate:
    """Figures of a model, or of several side by side, on a benchmark, each with its interval.

    With --model, its answers are generated and scored; with --answers, those of a file are scored, and no
    model is opened; with --reviews, a judge's verdicts. Where a judge scores the answers, it is asked: an
    endpoint (--judge.url, --judge.name) or a model (--judge.model). Writes OUT/results.json, the figures
    with all that they follow from, OUT/answers.jsonl, a line per record in the benchmark's own names of
    fields, with its figures (each as sum and weight) and what the benchmark says besides, of verdicts
    OUT/reviews.jsonl, and OUT/report.html, a page to look at. The same command continues an evaluation that
    was stopped.

    With `all` in place of a benchmark, every one that has a subfolder in --data. With `all` or several
    models, the files of each evaluation are in OUT/MODEL/BENCHMARK, and OUT/report.html compares the models
    with the first.
    """

    FIRST: ClassVar[str] = "EVALUATOR"
    COMMON: ClassVar[tuple[str, ...]] = (
        *("evaluator.prompt", "evaluator.sampling.max-tokens", "batch-size", "seed", "dtype"),
        *("data.format", "data.split", "data.max-records", "data.image-root", "data.over-long"),
        *("mesh.fsdp", "mesh.tensor", "judge.url", "judge.name", "judge.model", "judge.runs"),
    )

    config_file: Positional[Path]
    """Name of an evaluator, or your own as file.py:Name; or all."""
    data_file: Data
    """What the evaluator reads: a benchmark's folder (docs/evaluation.md), of `all` the folder around them;
    for your own, by default, a file, a folder or quoted pattern of shards, or the name of a cached data
    set."""
    out: Path
    """Folder to write."""
    model: tuple[Path, ...] = ()
    """Hugging Face model folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint); several are compared with the first."""
    answers: Path | None = None
    """Answers that exist, JSON lines or a JSON list, in place of a model."""
    reviews: tuple[Path, ...] = ()
    """A judge's verdicts that exist, for benchmarks that ask one; several files are several runs."""
    print_config: PrintConfig = None
    """Print the resolved config and stop, as JSON unless yaml is given; needs no other option."""
    config: Annotated[SuiteConfig, arg(name="")] = field(default_factory=EvaluationConfig)

    @staticmethod
    def place(argv: list[str]) -> list[str]:
        """`--evaluator NAME` in front, where the config of other verbs stands."""
        if "--evaluator" in argv[:-1] and argv[0].startswith("-"):
            at = argv.index("--evaluator")
            return [argv[at + 1], *argv[:at], *argv[at + 2 :]]
        return argv

    @staticmethod
    def load(name: str) -> SuiteConfig:
        return SuiteConfig() if name == ALL else EvaluationConfig(evaluator=EVALUATORS.find(name)())

    def __call__(self) -> None:
        given = {"--model": self.model, "--answers": self.answers, "--reviews": self.reviews}
        named = [name for name, value in given.items() if value]
        if len(named) > 1:
            raise InputError(f"evaluate takes {' or '.join(named)}, not both; leave one out")
        if not named:
            ways = "--model, which answers, or --answers, a file of them, or --reviews, a judge's verdicts"
            raise InputError(f"evaluate needs {ways}")
        if self.reviews and self.config.judge.given:
            raise InputError("evaluate takes --reviews or --judge, not both; leave one out")
        if not isinstance(self.config, EvaluationConfig) or len(self.model) > 1:
            self._several()
        else:
            self._one(self.config)

    def _one(self, config: EvaluationConfig) -> None:
        found = self._generated(config) if self.model else self._given(config)
        results = found.results
        left = f", {results['left_out']} left out" if "left_out" in results else ""
        lines = [*table(results["intervals"]), *self._of_judge(config.evaluator, results)]
        say = tell if self.model or config.judge.given else print  # else JAX need not start
        say("\n".join([*lines, f"{results['n']} records{left}; {self.out}"]))
        if results["scores"]:
            self._page(found)

    def _page(self, found: Evaluation) -> None:
        from mllm_align.evaluation.page import PAGE, write_page

        def write() -> None:
            given = [*self.model, self.answers, *self.reviews]
            name = Path(os.path.abspath(next(filter(None, given)))).name
            title = title_of(found.results["benchmark"])
            write_page({name: {title: read_evaluation(self.out)}}, self.out / PAGE)

        if not (self.model or self.config.judge.given):
            write()
            return
        from mllm_align import processes

        processes.on_first(write)

    def _generated(self, c: EvaluationConfig) -> Evaluation:
        (model,) = self.model
        begin(c.distributed)
        from mllm_align.evaluation.run import evaluate
        from mllm_align.models.bundle import load

        settings = {"batch_size": c.batch_size, "seed": c.seed, "config": c.data, "judge": c.judge}
        return evaluate(
            lambda: load(model, c.dtype, c.mesh),
            self.data_file,
            c.evaluator,
            out=self.out,
            **settings,
        )

    def _several(self) -> None:
        """Several models or benchmarks."""
        c = self.config
        if not self.model:
            raise InputError("all takes --model; give --answers and --reviews with the name of a benchmark")
        begin(c.distributed)
        from mllm_align.evaluation.page import PAGE
        from mllm_align.evaluation.suite import evaluate_all

        def done(model: str, benchmark: str, found: Evaluation) -> None:
            said = table(found.results["intervals"]) or ["its answers are kept; no judge has scored them"]
            tell("\n".join([f"{model} on {benchmark}", *said]))

        suite = evaluate_all(
            self.model,
            self.data_file,
            c.evaluator if isinstance(c, EvaluationConfig) else None,
            out=self.out,
            batch_size=c.batch_size,
            seed=c.seed,
            config=c.data,
            judge=c.judge,
            dtype=c.dtype,
            mesh=c.mesh,
            done=done,
        )
        tell("\n".join([*suite.sentences, str(self.out / PAGE)]))
        suite.check()

    def _given(self, c: EvaluationConfig) -> Evaluation:
        from mllm_align.evaluation.answers import score_answers
        from mllm_align.evaluation.reviews import score_reviews

        rest: dict = {"evaluator": c.evaluator, "out": self.out, "config": c.data}
        if self.answers:
            if c.judge.given:
                begin(c.distributed)
            rest |= {"judge": c.judge, "mesh": c.mesh}
            return score_answers(self.answers, self.data_file, **rest)
        return score_reviews(self.reviews, self.data_file, **rest)

    def _of_judge(self, evaluator: Evaluator, results: dict) -> list[str]:
        """What is to be said of verdicts."""
        if not isinstance(evaluator, Judged):
            return []
        if not (self.reviews or self.config.judge.given):
            if evaluator.scores_answers:
                return []
            file = self.out / ANSWERS
            ask = f"--answers {file} --judge.url URL --judge.name NAME and another --out"
            return [f"{file} has the answers; ask a judge with {ask}, or score its verdicts with --reviews"]
        lines = []
        if "runs" in results["scores"]:
            runs = ", ".join(f"{each:.4f}" for each in results["scores"]["runs"])
            lines = [f"{'runs':24}{runs}", f"{'std':24}{results['scores']['std']:.4f}"]
        if results["unparsable"]:
            count, where = results["unparsable"], self.out / REVIEWS
            lines.append(f"{count} verdicts can't be read: {evaluator.unread}; {where} marks them")
        return lines
