"""`mllm-align judge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.shared import Data, PrintConfig, begin, tell
from mllm_align.config import Config, JudgeConfig, load_config
from mllm_align.errors import refusal

ANNOTATOR = ("annotator", "annotator.model", "annotator.url", "annotator.function")
ANNOTATOR += ("annotator.max-tokens", "annotator.batch-size", "annotator.mesh")


@dataclass(frozen=True)
class Judge:
    """How often an annotator prefers the chosen responses of a file of pairs, asked in both orders.

    Prints a table; writes the figures to OUT and one JSON line per record beside it, with suffix .jsonl:
    index, id, outcome, right, scores, reason, answers.
    """

    COMMON: ClassVar[tuple[str, ...]] = (
        *(*ANNOTATOR, "data.split", "data.max-records", "data.image-root", "mesh.fsdp", "dtype"),
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
        begin(self.config.distributed)
        from mllm_align.evaluation.accuracy import judge, table

        tell(table(judge(self.model, self.data_file, self.config, out=self.out).results))
