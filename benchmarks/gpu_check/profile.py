"""Profiles of a train step and a short rollout: the ten most expensive operations, from JAX's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from gpu_check import model as shapes
from gpu_check.generation import rollout_call
from gpu_check.lines import Figures, Lines
from gpu_check.train import Step

STEPS, DEAREST = 2, 10
KINDS = {  # parts of the kernels' names
    "attention": ("sdpa", "cudnn"),
    "products": ("nvjet", "gemm", "cutlass", "dot"),
    "copies": ("memcpy", "memset"),
}
TOKENS = 8  # of a rollout
# Lines of a device that tell its operations again, grouped otherwise.
GROUPED = ("Steps", "XLA Modules", "XLA TraceMe", "Framework", "Source code", "Async XLA Ops")


DEVICES = ("/device:GPU:", "/device:TPU:")


class Event(NamedTuple):
    """Nanoseconds. name: the operation's in the compiled program; kernel: what the device ran for it."""

    name: str
    kernel: str
    start: float
    duration: float


def run(lines: Lines, work: Path, tiny: bool) -> None:
    chosen, held = shapes.sizes(tiny), []
    if lines("weights", lambda: shapes.weights(held, chosen)):
        (pairs, remat), count = chosen.steps[0], chosen.samples[0]
        step = f"train step, {pairs} pairs, remat {remat}"
        lines(step, lambda: profiled(Step(held[0], pairs, remat), work / "step"))
        item = f"rollout, {count} samples of {TOKENS} tokens"
        lines(item, lambda: profiled(sampled(held[0], count), work / "rollout"))


def sampled(held: shapes.Held, count: int) -> Callable[[], Any]:
    compiled, args = rollout_call(held, count, TOKENS)
    return lambda: jax.block_until_ready(compiled(*args))


def profiled(call: Callable[[], Any], folder: Path) -> Figures:
    call()
    with jax.profiler.trace(str(folder)):
        for _ in range(STEPS):
            call()
    (file,) = folder.rglob("*.xplane.pb")
    return dearest(ProfileData.from_file(str(file)), STEPS)


def dearest(profile: Any, steps: int, count: int = DEAREST) -> Figures:
    """Microseconds a step, of all operations, by kinds of kernels, and of the dearest ones with their share
    and their calls a step."""
    spent: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for line in device_lines(profile):
        for event, own in own_times(line):
            spent[event.name, event.kernel] += own
            calls[event.name, event.kernel] += 1
    whole = sum(spent.values())
    if not whole:
        raise RuntimeError("the trace has no operation of the device")
    ranked = sorted(spent, key=lambda each: -spent[each])[:count]
    return {
        "steps": steps,
        "operations": len(spent),
        "operations_us": whole / steps / 1e3,
        "kinds_us": {kind: us / steps / 1e3 for kind, us in of_kinds(spent).items()},
        "dearest": [
            {
                "operation": name,
                "kernel": kernel[:120],
                "us": spent[name, kernel] / steps / 1e3,
                "share": spent[name, kernel] / whole,
                "calls": calls[name, kernel] / steps,
            }
            for name, kernel in ranked
        ],
    }


def of_kinds(spent: dict[tuple[str, str], float]) -> dict[str, float]:
    """The same by kinds of kernels."""
    found = dict.fromkeys([*KINDS, "rest"], 0.0)
    for (_, kernel), time in spent.items():
        kinds = (kind for kind, marks in KINDS.items() if any(mark in kernel.lower() for mark in marks))
        found[next(kinds, "rest")] += time
    return found


def device_lines(profile: Any) -> Iterator[list[Event]]:
    """Each line's operations: of the devices' streams; where there are none, of the CPU's threads."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith(DEVICES)]
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if not line.name.startswith(GROUPED):
                events = [_event(each, bool(devices)) for each in line.events]
                yield [event for event in events if event is not None]


def _event(each: Any, device: bool) -> Event | None:
    stats = {name: value for name, value in each.stats if name is not None}
    operation = stats.get("hlo_op")
    if operation is None and not device:
        return None  # what else a thread of the host does
    return Event(str(operation or each.name), each.name, each.start_ns, each.duration_ns)


def own_times(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Each event's nanoseconds without those of the events within it (a loop holds its body's)."""
    inside: list[tuple[Event, list[float]]] = []
    for event in sorted(events, key=lambda e: (e.start, -e.duration)):
        while inside and event.start >= inside[-1][0].start + inside[-1][0].duration:
            yield _closed(inside)
        if inside:
            inside[-1][1].append(event.duration)
        inside.append((event, []))
    while inside:
        yield _closed(inside)


def _closed(inside: list[tuple[Event, list[float]]]) -> tuple[Event, float]:
    event, within = inside.pop()
    return event, max(event.duration - sum(within), 0.0)
