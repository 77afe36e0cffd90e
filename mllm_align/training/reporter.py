"""What a run tells while it goes: to log.jsonl, the terminal and the callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mllm_align.config import Config
from mllm_align.errors import SHOWN, Diverged, InputError, NotFinite, first_few
from mllm_align.models.bundle import Bundle
from mllm_align.processes import say, warn
from mllm_align.training.callbacks import Callback, gives_figures
from mllm_align.training.checkpoint import Checkpoints
from mllm_align.training.metrics import Log, line
from mllm_align.training.references import SKIP


class Reporter:
    """steps: of the run."""

    def __init__(
        self,
        config: Config,
        log: Log,
        checkpoints: Checkpoints,
        callbacks: Sequence[Callback],
        steps: int,
    ):
        self.config, self.log, self.checkpoints = config, log, checkpoints
        self.callbacks, self.steps = callbacks, steps
        self._being_saved: list[int] = []

    def step(self, values: dict[str, Any]) -> None:
        """The figures since the last time (see `Window.close`). Raises Diverged where one of them is above
        its limit."""
        left = values.pop("seconds_left")
        self.log("train", **values)
        say(line(values["step"], self.steps, values, left))
        for each in self.callbacks:
            each.on_step(values)
        limits = {} if self.config.online is None else self.config.online.limits
        for name, (field, limit) in limits.items():
            if (value := values.get(name)) is not None and value > limit:
                problem = f"step {values['step']}: {name} is {value:.4g}, above online.{field} ({limit:g})"
                remedy = "see the examples in log.jsonl; with a higher limit it goes on from what is saved"
                raise Diverged(f"{problem}; {remedy}")

    def evaluated(self, step: int, values: dict[str, Any]) -> None:
        """Figures of the held-out data."""
        self.log("eval", step=step, **values)
        for each in self.callbacks:
            each.on_eval(step, values)
        shown = [f"loss {values['loss']:.4f}"]
        if values.get("rewards/accuracy") is not None:
            shown += [f"margin {values['rewards/margin']:.4f}", f"acc {values['rewards/accuracy']:.3f}"]
        say(f"eval {step}  {'  '.join(shown)}")

    def asked(self, step: int) -> list[Callback]:
        """The callbacks that are asked for figures after this step."""
        ends = step in (0, self.steps)
        asked = [each for each in self.callbacks if gives_figures(each)]
        return [each for each in asked if ends or due(each.policy_every, step)]

    def ask(self, step: int, policy: Bundle) -> float | None:
        """Ask for figures of the policy, and log them. Returns config.best's of them, its sign turned where
        higher is better. Raises InputError where config.best is none of them."""
        best, figures, rank = self.config.best, dict[str, float](), None
        for each in self.asked(step):
            try:
                own = {name: float(value) for name, value in each.on_policy(step, policy).items()}
            except NotFinite as error:
                if self.config.nonfinite == "stop":
                    raise
                warn(f"benchmarks at step {step}: {error}; they are left out")
                continue
            figures |= own
            if best in own:
                rank = -own[best] if each.higher_is_better(best) else own[best]
        if figures:
            self.log("benchmark", step=step, **figures)
            heads = [name for name in figures if name.count("/") < 2] or figures
            shown = (f"{name} {figures[name]:.4g}" for name in heads)
            say(f"benchmark {step}  {'  '.join(shown)}")
        if not step and best != "loss" and rank is None:
            raise InputError(f"best is {best}; it must be one of {', '.join(figures) or 'no figures'}")
        return rank

    def saving(self, step: int) -> None:
        """A checkpoint is being written."""
        self.log("save", step=step)
        self.saved()  # of the one before, which had to be whole first
        self._being_saved.append(step)

    def saved(self) -> None:
        """Tell the callbacks of checkpoints that are whole by now."""
        places = [(step, self.checkpoints.folder / str(step)) for step in self._being_saved]
        self._being_saved.clear()
        for step, place in places:
            if self.callbacks and place.exists():  # a save that failed is told by the next
                for each in self.callbacks:
                    each.on_save(step, place)

    def best(self) -> tuple[int, str] | None:
        """Step of the best checkpoint, and what it is best by."""
        step, rank = self.checkpoints.best()
        if step is None:
            return None
        name = self.config.best
        if name == "loss":
            return step, f"the least held-out loss, {rank:.4f},"
        return step, f"the best {name}, {abs(rank):.4g},"

    def nonfinite(self, step: int, what: str, ids: list[str], during: str) -> None:
        """Write down the records; stop if the config says so. during: train or evaluation."""
        policy = self.config.nonfinite
        self.log("nonfinite", step=step, records=ids, policy=policy, during=during)
        count = f" ({len(ids)})" * (len(ids) > SHOWN)
        problem = f"{what} not finite, with records {first_few(ids)}{count}"
        if policy == "stop":
            raise NotFinite(f"{problem}; {SKIP}")
        warn(f"{problem}; the {'step' if during == 'train' else 'batch'} is left out")


def due(every: int | None, step: int) -> bool:
    """Whether what is done every so many steps is done after this one."""
    return every is not None and step % every == 0
