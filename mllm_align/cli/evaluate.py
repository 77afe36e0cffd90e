"""`mllm-align evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import Data, PrintConfig, begin, tell
from mllm_align.errors import InputError
from mllm_align.evaluation.base import EVALUATORS, EvaluationConfig


@dataclass(frozen=True)
class Evaluate:
    """A model's figures on a benchmark, each with its interval.

    With --model, its answers are generated and scored; with --answers, those of a file are scored, and no
    model is opened. Writes OUT/results.json, the figures with all that they follow from, and
    OUT/answers.jsonl, a line per record in the benchmark's own names of fields, with its figures (each as
    sum and weight) and what the benchmark says besides. The same command continues an evaluation that was
    stopped.
    """

    FIRST: ClassVar[str] = "EVALUATOR"
    COMMON: ClassVar[tuple[str, ...]] = (
        *("evaluator.prompt", "evaluator.sampling.max-tokens", "batch-size", "seed", "dtype"),
        *("data.format", "data.split", "data.max-records", "data.image-root", "data.over-long"),
        *("mesh.fsdp", "mesh.tensor"),
    )

    config_file: Positional[Path]
    """Name of an evaluator, or your own as file.py:Name."""
    data_file: Data
    """What the evaluator reads: a benchmark's folder (docs/evaluation.md); for your own, by default, a
    file, a folder or quoted pattern of shards, or the name of a cached data set."""
    out: Path
    """Folder to write."""
    model: Path | None = None
    """Hugging Face LLaVA folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    answers: Path | None = None
    """Answers that exist, JSON lines or a JSON list, in place of a model."""
    print_config: PrintConfig = None
    """Print the resolved config and stop, as JSON unless yaml is given; needs no other option."""
    config: Annotated[EvaluationConfig, arg(name="")] = field(default_factory=EvaluationConfig)

    @staticmethod
    def place(argv: list[str]) -> list[str]:
        """`--evaluator NAME` in front, where the config of other verbs stands."""
        if "--evaluator" in argv[:-1] and argv[0].startswith("-"):
            at = argv.index("--evaluator")
            return [argv[at + 1], *argv[:at], *argv[at + 2 :]]
        return argv

    @staticmethod
    def load(name: str) -> EvaluationConfig:
        return EvaluationConfig(evaluator=EVALUATORS.find(name)())

    def __call__(self) -> None:
        from mllm_align.evaluation.results import table

        if self.model is not None and self.answers is not None:
            raise InputError("evaluate takes --model or --answers, not both; leave one out")
        if self.model is None and self.answers is None:
            raise InputError("evaluate needs --model, which answers, or --answers, a file of them")
        results = self._generated(self.model) if self.model else self._given(self.answers or Path())
        left = f", {results['left_out']} left out" if "left_out" in results else ""
        say = tell if self.model else print  # without a model JAX need not start
        say("\n".join([*table(results["intervals"]), f"{results['n']} records{left}; {self.out}"]))

    def _generated(self, model: Path) -> dict:
        c = self.config
        begin(c.distributed)
        from mllm_align.evaluation.run import evaluate
        from mllm_align.models.bundle import load

        settings = {"batch_size": c.batch_size, "seed": c.seed, "config": c.data}
        return evaluate(
            lambda: load(model, c.dtype, c.mesh),
            self.data_file,
            c.evaluator,
            out=self.out,
            **settings,
        ).results

    def _given(self, answers: Path) -> dict:
        from mllm_align.evaluation.answers import score_answers

        c = self.config
        return score_answers(answers, self.data_file, c.evaluator, out=self.out, config=c.data).results
