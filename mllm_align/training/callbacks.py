"""What a run tells a program while it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_align.errors import InputError


class Callback:
    """Override what you need; `train(..., callbacks=[Mine()])`.

    Of several processes, each calls its own. What a method raises ends the run, which the same call
    continues from its last checkpoint.
    """

    def on_step(self, metrics: dict[str, Any]) -> None:
        """After each step that is logged (config.log_every), with the figures of log.jsonl since the one
        before: step, loss, learning_rate and more."""

    def on_eval(self, step: int, metrics: dict[str, Any]) -> None:
        """After each evaluation on the held-out data: loss and more."""

    def on_save(self, step: int, path: Any) -> None:
        """As soon as a checkpoint is whole. path: its folder, `etils.epath.Path`, which may be on gs://."""


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises InputError for what is no Callback."""
    for each in callbacks:
        if not isinstance(each, Callback):
            found = getattr(each, "__name__", type(each).__name__)
            raise InputError(f"callbacks has {found}, which is no mllm_align.Callback; make it a subclass")
