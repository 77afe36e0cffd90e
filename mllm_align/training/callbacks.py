"""What a run tells a program while it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm_align.errors import InputError
from mllm_align.models.bundle import Bundle


class Callback:
    """Override what you need; `train(..., callbacks=[Mine()])`.

    Of several processes, each calls its own. What a method raises ends the run, which the same call
    continues from its last checkpoint.
    """

    policy_every: int | None = None
    """Steps between calls of `on_policy`; None: before the first step and after the last alone."""

    def on_start(self, bundle: Bundle) -> None:
        """Before anything is written: the model that training starts from. What can't be used is refused
        here."""

    def on_policy(self, step: int, policy: Bundle) -> Mapping[str, float]:
        """Figures of the policy, by names that say whose they are, as pope/mean_f1. Called before the first
        step (step 0), every `policy_every` steps, and after the last; the figures go to log.jsonl, event
        `benchmark`, and to the trackers; config.best may name one of them. policy: the model with what is
        trained by now, which the next step overwrites: keep nothing of it."""
        return {}

    def higher_is_better(self, figure: str) -> bool:
        """Of a figure of `on_policy`."""
        return True

    def on_step(self, metrics: dict[str, Any]) -> None:
        """After each step that is logged (config.log_every), with the figures of log.jsonl since the one
        before: step, loss, learning_rate and more."""

    def on_eval(self, step: int, metrics: dict[str, Any]) -> None:
        """After each evaluation on the held-out data: loss and more."""

    def on_save(self, step: int, path: Any) -> None:
        """As soon as a checkpoint is whole. path: its folder, `etils.epath.Path`, which may be on gs://."""


def gives_figures(callback: Callback) -> bool:
    """Whether it has an `on_policy` of its own."""
    return type(callback).on_policy is not Callback.on_policy


def check_callbacks(callbacks: Sequence[Any], best: str = "loss") -> None:
    """Raises InputError for what is no Callback, and where nothing gives the figure `best`."""
    for each in callbacks:
        if not isinstance(each, Callback):
            found = getattr(each, "__name__", type(each).__name__)
            raise InputError(f"callbacks has {found}, which is no mllm_align.Callback; make it a subclass")
    if best != "loss" and not any(map(gives_figures, callbacks)):
        raise InputError(f"best is {best}, and no benchmark is asked; name it with --evaluate")
