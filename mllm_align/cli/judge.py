"""`mllm-align judge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import Data, PrintConfig, begin, result, tell
from mllm_align.config import Config, JudgeConfig, load_config
from mllm_align.errors import InputError, refusal
from mllm_align.files import json_text, lines_beside


@dataclass(frozen=True)
class Judge:
    """How often an annotator prefers the chosen responses of a file of pairs, asked in both orders.

    Prints a table; writes the figures to OUT and one JSON line per record beside it, with suffix .jsonl:
    index, id, outcome, right, scores, reason, answers.
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *("annotator", "annotator.model", "annotator.url", "annotator.function", "annotator.max-tokens"),
        *("annotator.batch-size", "annotator.mesh", "data.split", "data.image-root", "mesh.fsdp", "dtype"),
    )

    config_file: Positional[Path]
    """Name of a config (mllm-align configs), a Python file whose get_config() gives a JudgeConfig or the
    Config of a run that has an annotator, or a YAML file of either."""
    data_file: Data
    """Preference pairs: a file, a folder or quoted pattern of shards, or the name of a cached data set."""
    out: Path
    """File to write, JSON."""
    model: Path | None = None
    """The policy's base, as `train` takes it; needed where the annotator is it."""
    print_config: PrintConfig = None
    """Print the resolved config and stop, as JSON unless yaml is given; needs no other option."""
    config: Annotated[JudgeConfig, arg(name="")] = field(default_factory=JudgeConfig)

    @staticmethod
    def load(file: str) -> JudgeConfig:
        """The config; of a run's config, what judge takes of it."""
        config = load_config(file, (JudgeConfig, Config))
        if isinstance(config, JudgeConfig):
            return config
        if config.online is None or config.online.annotator is None:
            found = f"its Config has no annotator (online is {type(config.online).__name__})"
            raise refusal(file, found, "give a JudgeConfig, or a Config with online=OnlinePairs(...)")
        c = config
        return JudgeConfig(config.online.annotator, c.data, c.mesh, c.distributed, c.dtype)

    def __call__(self) -> None:
        config, out, beside = self.config, self.out, lines_beside(self.out)
        begin(config.distributed)
        from mllm_align.evaluation.accuracy import accuracy, table
        from mllm_align.models.bundle import load
        from mllm_align.training.run_folder import open_base

        asked = config.annotator.asks_base
        if asked and self.model is None:
            raise InputError("judge needs --model: the annotator is the policy's own base")
        with result(beside, self.data_file) as lines_file, result(out, self.data_file) as file:
            base = None
            if asked and self.model:  # a run's policy, as it would be the base of another
                base = load(open_base(self.model), config.dtype, config.mesh)
            summary, lines = accuracy(config, self.data_file, base, out.with_suffix(".answers"))
            about = {"data": str(self.data_file), "model": str(self.model) if asked else None}
            file.write(json_text(about | summary, indent=2) + "\n")
            lines_file.writelines(json_text(line) + "\n" for line in lines)
        tell(table(summary))
