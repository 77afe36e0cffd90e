"""What several verbs need: processes, models, outputs that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from tyro.conf import arg

from mllm_align.config import DistributedConfig, Dtype, MeshConfig
from mllm_align.errors import refusal
from mllm_align.files import json_text

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


def open_model(model: Path, dtype: Dtype, mesh: MeshConfig) -> Any:
    """A model, or a run folder's newest checkpoint."""
    from mllm_align.models.bundle import load
    from mllm_align.training.run_folder import is_run, load_run

    return (load_run if is_run(model) else load)(model, dtype, mesh)


@contextlib.contextmanager
def result(out: Path, data: Path) -> Iterator[IO[str]]:
    """The file `out`, whole or not at all, and no other run's meanwhile; nothing where another process of
    the job writes it. Raises InputError if it would replace its own data."""
    from mllm_align import processes
    from mllm_align.files import new_file
    from mllm_align.locks import alone

    with alone(out):
        if os.path.exists(out) and os.path.exists(data) and os.path.samefile(out, data):
            raise refusal(str(out), "is the data file itself", "give another --out")
        try:
            with new_file(out) if processes.first() else open(os.devnull, "w") as file:
                yield file
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted; {out} is not written") from error


def tell(text: str) -> None:
    """Print a result, once for all processes of a job."""
    from mllm_align import processes

    if processes.first():
        print(text, flush=True)


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
