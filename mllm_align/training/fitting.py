"""`remat auto`: of the rematerialisations that fit in the memory of the devices, the fastest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_align import processes
from mllm_align.batch import Shape
from mllm_align.config import Config
from mllm_align.models.config import ModelConfig
from mllm_align.models.remat import POLICIES
from mllm_align.processes import say
from mllm_align.training.programs import Program, batch_structs

LADDER = ("dots", "gate", "qkv", "attention", "full")
"""The fastest first, each with less memory than the one before. `none` is not among them: it takes more
memory than `dots`, and is no faster (benchmarks/README.md)."""
ROOM = 0.95
"""Share of the memory that a step may take; the rest is for batches made ahead and gaps between arrays."""


@dataclass(frozen=True)
class Fit:
    """policy: one of `models.remat`. where: mesh, devices and micro-batches that it was found for. limit:
    bytes of a device that a step may take, None where that is not known. needed: bytes that it takes under
    the policies that were compiled, None where the compiler refuses."""

    policy: str
    where: dict[str, Any]
    limit: int | None
    needed: dict[str, int | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.limit is None:
            return f"remat {self.policy}: these devices tell no limit of their memory"
        each = ", ".join(f"{name} {_gib(self.needed[name])}" for name in LADDER if name in self.needed)
        return (
            f"remat {self.policy}: of {_gib(self.limit)} GiB a device that a step may take, it takes {each}"
        )


def _gib(size: int | None) -> str:
    return "too much" if size is None else f"{size / 2**30:.2f}"


def fitting_remat(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    shape: Shape,
    program: Callable[[Config], Program],
    held: Any,
    saved: Any = None,
) -> Fit:
    """What `remat auto` comes to, the same on all processes.

    shape: the largest of the data. program: the programs of a config. held: arguments of the step that are
    on the devices already. saved: a `Fit` of the run that goes on, as JSON; it stands on the same mesh and
    devices, with the same micro-batches, so that the run goes on to the last bit.
    """
    devices = mesh.devices
    where = {
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "devices": f"{devices.size} x {devices.flat[0].device_kind}",
        "micro_batches": config.micro_batches,
    }
    if isinstance(saved, dict) and saved.get("where") == where and saved.get("policy") in POLICIES:
        return Fit(saved["policy"], where, saved.get("limit"), saved.get("needed", {}))
    frees = processes.gathered(lambda: free(mesh.local_devices, bytes_of(held)))
    if None in frees:
        cpu = devices.flat[0].platform == "cpu"
        return Fit("none" if cpu else "full", where, None, {})
    if config.online is not None and config.online.generates:
        shape = replace(shape, response=max(shape.response, config.online.sampling.max_tokens))
    needed: dict[str, int | None] = {}
    limit = int(ROOM * min(frees))

    def fits(policy: str) -> bool:
        say(f"compiling with remat {policy}, to see whether it fits")
        one = replace(config, remat=policy)  # type: ignore[arg-type]
        batch = batch_structs(one, model, mesh, shape, config.objective.views)
        sizes = processes.gathered(lambda: needs(program(one), batch))
        needed[policy] = size = None if None in sizes else max(sizes)
        return size is not None and size <= limit

    return Fit(fastest(fits), where, limit, needed)


def fastest(fits: Callable[[str], bool]) -> str:
    """The first of the ladder that fits, found by bisection; the last one is not tried."""
    return LADDER[bisect_left(LADDER[:-1], True, key=fits)]


def needs(program: Program, batch: Any) -> int | None:
    """Bytes that a step on `batch`, given by its shapes, takes on a device; None if the compiler says that
    there are too few."""
    try:
        compiled = program.step.lower(program.state, program.base, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return total(memory(compiled))


def memory(compiled: Any) -> dict[str, int]:
    """Bytes of a compiled program on one device, by kind."""
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }


def total(memory: dict[str, int]) -> int:
    """Bytes that a program needs on a device."""
    data = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    return data + memory.get("code", 0)


def free(devices: Sequence[Any], held: int) -> int | None:
    """Bytes that a program may take on each of the devices, which hold `held` bytes of its arguments
    already; None if a device tells no limit."""
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in each for each in stats):
        return None
    return min(each["bytes_limit"] - each.get("bytes_in_use", 0) for each in stats) + held


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of sharded arrays, or of their shapes, on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
