"""The mesh, and which of its axes each kind of array is cut along. No other file names mesh axes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_align.config import MeshConfig
from mllm_align.errors import InputError

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter (as modules name them) -> mesh axis. What is not here is not cut.
RULES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices. Raises InputError if the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // fixed, 1)
    if int(np.prod(sizes)) != len(devices):
        asked = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise InputError(f"mesh: {asked} does not make {len(devices)} devices; set --mesh.* to match")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Parts a micro-batch is cut into; its rows must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, micro: bool = True) -> NamedSharding:
    """Rows over data and fsdp; the axis of micro-batches before them, if any, is not cut."""
    rows = ("data", "fsdp")
    return NamedSharding(mesh, P(None, rows) if micro else P(rows))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for a tree whose leaves carry `.names` (logical axes) and `.value` with a shape.

    An axis that does not divide by its mesh axis stays whole.
    """

    def of(leaf: Any) -> NamedSharding:
        names = [RULES.get(name) if name else None for name in leaf.names]
        fits = zip(names, leaf.value.shape, strict=True)
        return NamedSharding(mesh, P(*(n if n and size % mesh.shape[n] == 0 else None for n, size in fits)))

    return jax.tree.map(of, boxed, is_leaf=lambda x: hasattr(x, "names"))


def tree_lookup(tree: Any) -> Callable[[tuple[str, ...]], NamedSharding]:
    """Path of a leaf -> its sharding."""

    return lambda path: functools.reduce(lambda node, key: node[key], path, tree)
