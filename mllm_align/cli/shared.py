"""What several verbs need: processes, options, what they print and log."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from mllm_align.config import DataConfig, DistributedConfig
from mllm_align.files import json_text

if TYPE_CHECKING:
    from mllm_align.data.encode import Encoder
    from mllm_align.models.config import ModelConfig

# Fields named `data` are the branch --data.*; the file is --data.
Data = Annotated[Path, arg(name="data", metavar="FILE")]
OptionalData = Annotated[Path | None, arg(name="data", metavar="FILE")]
PrintConfig = Literal["json", "yaml"] | None


def begin(distributed: DistributedConfig | None = None) -> None:
    """Join the other processes, if any; keep compiled programs. Before anything else of JAX."""
    from mllm_align import processes

    times = distributed or DistributedConfig()
    processes.start(times.heartbeat_seconds, times.shutdown_seconds)
    processes.keep_compiled()


def open_encoder(model: Path, data: DataConfig) -> tuple[ModelConfig, Encoder]:
    """A model's configuration and its encoder; no weights are read."""
    from mllm_align.models.bundle import Bundle
    from mllm_align.models.processor import load_processor
    from mllm_align.models.sources import open_model
    from mllm_align.prepare import make_encoder
    from mllm_align.training.run_model import base_folder

    folder = open_model(base_folder(model))
    bundle = Bundle(folder, load_processor(folder.path), None, None, {})  # type: ignore[arg-type]
    return bundle.config, make_encoder(bundle, data)


def tell(text: str) -> None:
    """Print a result, once for all processes of a job."""
    from mllm_align import processes

    processes.say(text)


def note(text: str) -> None:
    """Say what a user may want to know beside the result, on stderr, once for all processes of a job."""
    from mllm_align import processes

    if processes.first():
        print(text, file=sys.stderr, flush=True)


def log_beside(out: Path, **fields: Any) -> None:
    """Append a line to OUT.log.jsonl, once for all processes of a job."""
    from mllm_align import processes

    if processes.first():
        with open(out.with_name(out.name + ".log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json_text({"time": round(time.time(), 3), **fields}) + "\n")
