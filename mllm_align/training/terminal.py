"""What a run tells on the terminal, and where its time goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_align.batch import Shape
from mllm_align.config import Config
from mllm_align.models.bundle import Bundle
from mllm_align.models.quantised import count
from mllm_align.processes import say
from mllm_align.training.metrics import duration


class Clock:
    """Seconds since the start, and what they went to besides steps."""

    def __init__(self):
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - began)

    def add(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def text(self) -> str:
        """ "3:20 (compiling 0:22, evaluating 0:11)" """
        parts = [f"{what} {duration(seconds)}" for what, seconds in self.seconds.items() if seconds >= 1]
        whole = duration(time.perf_counter() - self.began)
        return whole + f" ({', '.join(parts)})" * bool(parts)


@contextmanager
def waiting(text: str, seconds: float = 2.0) -> Iterator[None]:
    """Say what is going on if the block takes longer: a refusal that comes sooner stands alone."""
    timer = threading.Timer(seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def number(count: float) -> str:
    """7050832896 -> "7.05 B"."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def parameters(tree: Any) -> str:
    return number(count(tree))


def start(
    config: Config,
    bundle: Bundle,
    out: Path,
    step: int,
    steps: int,
    counts: tuple[int, int, int],
    shapes: Sequence[Shape],
    trained: Any,
) -> str:
    """What is about to happen. step: already done. counts: records, those left out, held-out records."""
    records, left_out, held_out = counts
    devices, size = bundle.mesh.devices, config.batch_size
    parts = [f"LoRA of rank {config.lora.rank}"] if config.lora else []
    lines = {
        "model": f"{bundle.config.family}, {parameters(bundle.params)} parameters in {bundle.kept}, "
        f"on {devices.size} x {devices.flat[0].device_kind}",
        "trains": f"{parameters(trained)} parameters: {', '.join([*parts, *trained.get('params', {})])}",
        "data": ", ".join(
            [f"{records:,} records"]
            + [f"{left_out:,} left out"] * bool(left_out)
            + [f"{held_out:,} held out"] * bool(held_out)
            + [f"{size} a step, {steps * size / records:.3g} epochs in all"]
        ),
        "shapes": f"{len(shapes)}; the first step of each compiles",
        "saves": f"every {config.save_every:,} steps; Ctrl-C or SIGTERM: after the step under way",
    }
    begins = (
        f"resuming {out}: {step} of {steps} steps are done" if step else f"starting {out}: {steps} steps"
    )
    return "\n".join([begins, *(f"  {name:8}{text}" for name, text in lines.items())])


def shape(each: Shape) -> str:
    """What all groups of a batch are padded to."""
    prefixes = " and ".join(str(length) for length, _ in each.prefixes)
    return f"{prefixes} + {each.response} tokens and {sum(tiles for _, tiles in each.prefixes)} tiles"


def done(out: Path, clock: Clock, steps: int, newest: int, best: tuple[int, str] | None) -> str:
    """What came of it. steps: taken by this start. newest: of the whole run. best: the step that evaluated
    best, and by what."""
    saved = f"step {newest}"
    if best is not None:
        saved += f"; {best[1]} is that of step {best[0]}"
    took = f"done: {steps} {'step' if steps == 1 else 'steps'} in {clock.text()}"
    return "\n".join([took, f"  saved   {saved}", f"  next    {export(out, best and best[0], newest)}"])


def finished(out: Path, step: int) -> str:
    return f"{out} is finished: all {step} steps are done and saved\n  next    {export(out, None, step)}"


def export(out: Path, best: int | None, newest: int) -> str:
    which = " --step best" if best not in (None, newest) else ""
    return f"mllm-align export --run {out}{which} --out FOLDER"
