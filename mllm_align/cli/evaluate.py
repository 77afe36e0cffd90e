"""`mllm-align evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import Data, PrintConfig, begin, tell
from mllm_align.evaluation.base import EVALUATORS, EvaluationConfig


@dataclass(frozen=True)
class Evaluate:
    """A model's figures on a benchmark, each with its interval.

    Writes them to OUT, with all that they follow from, and one JSON line per record beside it, with suffix
    .jsonl: index, id, response or logps, figures (each as sum and weight), what the evaluator says besides.
    The same command continues an evaluation that was stopped.
    """

    FIRST: ClassVar[str] = "EVALUATOR"
    COMMON: ClassVar[tuple[str, ...]] = (
        *("evaluator.sampling.max-tokens", "batch-size", "seed", "dtype", "data.format", "data.split"),
        *("data.max-records", "data.image-root", "data.over-long", "mesh.fsdp", "mesh.tensor"),
    )

    config_file: Positional[Path]
    """Name of an evaluator, or your own as file.py:Name."""
    model: Path
    """Hugging Face LLaVA folder, PEFT adapter folder, the name of either in the local Hub cache, or a run
    folder (its newest checkpoint)."""
    data_file: Data
    """What the evaluator reads: a file, a folder or quoted pattern of shards, or the name of a cached data
    set."""
    out: Path
    """File to write, JSON."""
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
        c = self.config
        begin(c.distributed)
        from mllm_align.evaluation.run import evaluate
        from mllm_align.models.bundle import load

        bundle = load(self.model, c.dtype, c.mesh)
        settings = {"batch_size": c.batch_size, "seed": c.seed, "config": c.data}
        results, _ = evaluate(bundle, self.data_file, c.evaluator, out=self.out, **settings)
        for name, each in results["intervals"].items():
            ends = "" if each["low"] is None else f" ({each['low']:.4f} to {each['high']:.4f})"
            tell(f"{name:20}{each['mean']:.4f}{ends} of {each['n']}")
        tell(f"{results['n']} records, {results['left_out']} left out; {self.out}")
