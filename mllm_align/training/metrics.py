"""Metrics as (sum, weight), divided once when they are logged; where they are written."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mllm_align.errors import InputError
from mllm_align.files import json_text
from mllm_align.training.trackers import Trackers


@jax.jit
def add(total: Any, more: Any) -> Any:
    """Sums and weights of several steps, added on the device."""
    return jax.tree.map(jnp.add, total, more)


def divide(total: Any) -> dict[str, float | None]:
    """(sum, weight) pairs on the host, divided; None where nothing weighs.

    The loss of an objective of several terms is the sum of those: each has a weight of its own.
    """
    values = {name: float(s) / float(w) if float(w) else None for name, (s, w) in total.items()}
    terms = [value for name, value in values.items() if name.startswith("loss/")]
    if any(value is not None for value in terms):
        values["loss"] = sum(value for value in terms if value is not None)
    return values


class Log:
    """Appends one JSON object a line to `log.jsonl` in the run folder, and gives its numbers to trackers.

    Every line has `event` and `time` (seconds since 1970); train and eval lines have `step`. A figure that
    nothing weighs in is null; one that is not finite raises NotFinite, and its line is not written.
    """

    def __init__(self, folder: Path | None, trackers: Trackers | None = None):
        """folder: None for a process that does not write. trackers: get the floats of lines with a step."""
        place = os.devnull if folder is None else folder / "log.jsonl"
        self._file = open(place, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._trackers = trackers

    def __call__(self, event: str, **fields: Any) -> None:
        line = json_text({"event": event, "time": round(time.time(), 3), **fields})
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"can't write {self._file.name}: {error.strerror}; make room") from error
        numbers = {f"{event}/{name}": value for name, value in fields.items() if isinstance(value, float)}
        if self._trackers is not None and numbers and "step" in fields:
            self._trackers.log(fields["step"], numbers)

    def close(self) -> None:
        with suppress(OSError):  # after a write that failed, closing tries it again
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def line(step: int, steps: int, values: dict[str, Any], left: float | None) -> str:
    """One tidy line for the terminal."""
    shown = [f"step {step:>{len(str(steps))}}/{steps}"]
    if values["loss"] is None:
        shown.append("no loss")
    for name, label, form in (
        ("loss", "loss", ".4f"),
        ("rewards/margin", "margin", ".4f"),
        ("rewards/accuracy", "acc", ".2f"),
        ("reward", "reward", ".4g"),
        ("kl/sequence", "kl", ".3g"),
        ("grad_norm", "grad", ".3g"),
        ("learning_rate", "lr", ".2e"),
        ("pairs_per_second", "pairs/s", ".2f"),
    ):
        if values.get(name) is not None:
            shown.append(f"{label} {values[name]:{form}}")
    return "  ".join(shown if left is None else [*shown, f"{duration(left)} left"])


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
