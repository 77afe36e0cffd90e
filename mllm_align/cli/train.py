"""`mllm-align train`."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import PrintConfig, begin
from mllm_align.config import Config, DataConfig
from mllm_align.config.checks import STEPS, check_number
from mllm_align.errors import InputError


@dataclass(frozen=True)
class Train:
    """Align a multimodal model to preference pairs; the result is a run folder.

    Writes config.json, run.json, log.jsonl (log-probs in nats, summed over response tokens) and
    checkpoints/ into the run folder. The same command continues a run that was stopped. `--reward RUN`
    stands for `--online.annotator reward --online.annotator.model RUN`.
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("objective", "objective.beta", "online", "online.annotator", "lora", "lora.rank"),
        *("optim.learning-rate", "batch-size", "micro-batches", "epochs", "steps", "seed", "dtype"),
        *("mesh.fsdp", "data.split", "data.image-root", "data.max-length"),
        *("eval-every", "save-every"),
    )
    RARE: ClassVar[tuple[str, ...]] = (
        *("evaluate-data", "evaluate-questions", "profile", "allow-schedule-change", "debug-nans"),
    )

    config_file: Positional[Path]
    """Name of a config (mllm-align configs), a Python file with get_config(), or a YAML file."""
    model: Path
    """What to start from: a Hugging Face model folder, a PEFT adapter's folder, the name of either in the
    local Hub cache, or another run's folder (its newest checkpoint). Also the reference."""
    data_file: Annotated[tuple[Path, ...], arg(name="data", metavar="FILE")]
    """Pairs: a file, folder, quoted pattern or a cached data set's name. Several are mixed by weight, as
    A:2 B:1: shares of what is trained on."""
    out: Path
    """Run folder."""
    eval_data: Path | None = None
    """Held-out pairs to evaluate on; of several splits, --data.eval-split is read."""
    init_from: Path | None = None
    """Run whose newest checkpoint to start from. Of the same base: the reference stays --model. To have its
    policy as the reference too, give it as --model."""
    evaluate: tuple[str, ...] = ()
    """Benchmarks that the policy is asked while it trains (--evaluate-data). Or your own as file.py:Name:
    before the first step, after the last, and every --evaluate-every steps."""
    evaluate_data: Path | None = None
    """Folder with a subfolder for each of them, named like it."""
    evaluate_every: int | None = None
    """Steps between their figures."""
    evaluate_questions: int = 200
    """How many questions of each are asked, drawn once at random."""
    profile: int = 0
    """Trace this many steps to OUT/profile. After the first; for XProf, TensorBoard and Perfetto."""
    allow_schedule_change: bool = False
    """Continue for another number of steps though learning rates change. Those of the run's schedule."""
    debug_nans: bool = False
    """Stop at the operation that makes a NaN first; slow."""
    print_config: PrintConfig = None
    """Print the resolved config and stop, as JSON unless yaml is given; needs no other option."""
    config: Annotated[Config, arg(name="")] = field(default_factory=Config)

    @staticmethod
    def place(argv: list[str]) -> list[str]:
        """The arguments with --reward written out."""
        words: list[str] = []
        for word in argv:
            name, equals, value = word.partition("=")
            if name == "--reward":
                words += ["--online.annotator", "reward", "--online.annotator.model" + equals + value]
            else:
                words.append(word)
        return words

    def __call__(self) -> None:
        check_number("--profile", self.profile, 0, STEPS)
        begin(self.config.distributed)
        _quiet()
        import jax

        from mllm_align.data.mixture import mixture, weighted
        from mllm_align.training.loop import train

        jax.config.update("jax_debug_nans", self.debug_nans)
        callbacks = []
        if self.evaluate:
            from mllm_align.evaluation.while_training import Benchmarks

            if self.evaluate_data is None:
                raise InputError("--evaluate needs data; name the benchmarks' folder with --evaluate-data")
            how = {"questions": self.evaluate_questions, "config": self._benchmark_data()}
            callbacks = [Benchmarks(self.evaluate, self.evaluate_data, self.evaluate_every, **how)]
        sets = weighted(self.data_file, "--data")
        data = sets[0].file if len(sets) == 1 else mixture(sets)
        files = self.model, data, self.out, self.eval_data
        train(
            self.config,
            *files,
            callbacks=callbacks,
            profile=self.profile,
            allow_schedule_change=self.allow_schedule_change,
            init_from=self.init_from,
        )

    def _benchmark_data(self) -> DataConfig:
        """As the run reads its own, as far as that concerns others."""
        data = self.config.data
        return DataConfig(chat_template=data.chat_template, allow_outside=data.allow_outside)


def _quiet() -> None:
    """A save that fails raises one error; what its threads print besides would hide it."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks of that save which nobody waits for
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            before(raised)

    sys.unraisablehook = hook
