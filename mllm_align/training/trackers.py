"""Where a run's figures are shown beside log.jsonl: TensorBoard, Weights & Biases, MLflow.

Projects, servers and keys are given as these programs take them themselves, by environment variables and
log-ins. A run that goes on is continued under the identity that `trackers.json` in its folder keeps.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mllm_align.config import TRACKERS, Config, to_json
from mllm_align.errors import InputError, one_line
from mllm_align.files import new_file, read_json

PROJECT = "mllm_align"
IDENTITIES = "trackers.json"  # name of a tracker -> what it calls the run


class Tracker(Protocol):
    """`identity`: what names the run when it goes on; None where its folder does."""

    @property
    def identity(self) -> str | None: ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """values: by names such as train/loss."""

    def close(self) -> None: ...


class TensorBoard:
    identity = None

    def __init__(self, run: Path, config: dict[str, Any], identity: str | None):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, run: Path, config: dict[str, Any], identity: str | None):
        wandb: Any = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        how = {"id": identity, "resume": "allow", "dir": str(run), "config": config}
        self._run = wandb.init(project=project, name=run.resolve().name, **how)
        self.identity = self._run.id

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    def __init__(self, run: Path, config: dict[str, Any], identity: str | None):
        self._mlflow: Any = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        self.identity = identity or self._begun(run.resolve().name, config)
        self._client.update_run(self.identity, status="RUNNING")

    def _begun(self, name: str, config: dict[str, Any]) -> str:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(project)
        place = self._client.create_experiment(project) if found is None else found.experiment_id
        identity = self._client.create_run(place, run_name=name).info.run_id
        params = [self._mlflow.entities.Param(name, str(value)[:500]) for name, value in _flat(config)]
        for start in range(0, len(params), 100):  # no more are taken at once
            self._client.log_batch(identity, params=params[start : start + 100])
        return identity

    def log(self, step: int, values: dict[str, float]) -> None:
        metric, now = self._mlflow.entities.Metric, round(1000 * time.time())
        self._client.log_batch(self.identity, [metric(*each, now, step) for each in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self.identity)


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


OPENED: dict[str, Callable[[Path, dict[str, Any], str | None], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError for a tracker whose package is not installed."""
    for name in names:
        package = TRACKERS[name]
        try:
            importlib.import_module(package)
        except ImportError as error:
            extra = f"pip install 'mllm-align[{name}]'"
            raise InputError(f"tracker {name} needs the package {package}: {extra}") from error


class Trackers:
    """Those that a run's config names. One that fails is told of once and left out: no run ends for it."""

    def __init__(self, config: Config, run: Path):
        self._opened: dict[str, Tracker] = {}
        if not config.trackers:
            return
        place = run / IDENTITIES
        known = read_json(place, "remove it, and the trackers begin anew") if place.exists() else {}
        for name in config.trackers:

            def open_it(name: str = name) -> None:
                self._opened[name] = OPENED[name](run, to_json(config), known.get(name))

            self._guarded(name, open_it)
        found = {name: each.identity for name, each in self._opened.items() if each.identity is not None}
        if found:
            with new_file(place) as file:
                file.write(json.dumps(known | found) + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, each in list(self._opened.items()):
            self._guarded(name, lambda each=each: each.log(step, values))

    def close(self) -> None:
        for name, each in list(self._opened.items()):
            self._guarded(name, each.close)

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # a server, its network or another program: anything may come out of it
            self._opened.pop(name, None)
            said = f"{type(error).__name__}: {one_line(error, 200)}"
            print(f"tracker {name} fails ({said}); the run goes on without it", file=sys.stderr, flush=True)
