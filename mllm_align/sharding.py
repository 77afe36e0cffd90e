"""The mesh, and which of its axes each kind of array is cut along. No other file names mesh axes.

Modules speak of logical axes ("rows", "embed", "heads"); RULES say where each goes. What is
`traced_within` a mesh may `constrain` an array or run a function `per_shard`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_align.config import MeshConfig
from mllm_align.errors import InputError

AXES = ("slice", "data", "fsdp", "tensor")
ROWS = ("slice", "data", "fsdp")

# Logical axis -> mesh axes. What is not here is not cut.
RULES: dict[str | None, str | tuple[str, ...]] = {
    "rows": ROWS,  # of a batch
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vision_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

F = TypeVar("F", bound=Callable[..., Any])
_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh slice x data x fsdp x tensor over all devices.

    The devices know how many slices of a multi-slice pod there are; the other sizes are of one slice.
    Raises InputError if they do not multiply to its number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    physical = len({getattr(d, "slice_index", 0) for d in devices})
    slices, *sizes = _sizes(config, len(devices), config.slices or physical)
    kinds = (AxisType.Auto,) * len(AXES)
    if 1 < slices == physical:  # only the slice axis crosses the network between slices
        grid = mesh_utils.create_hybrid_device_mesh((1, *sizes), (slices, 1, 1, 1), devices)
        return Mesh(grid, AXES, axis_types=kinds)
    return jax.make_mesh((slices, *sizes), AXES, axis_types=kinds, devices=devices)


def remade(mesh: Mesh, config: MeshConfig) -> Mesh:
    """The same devices in the same order with other axes: arrays move between the two within a program."""
    sizes = _sizes(config, mesh.size, config.slices or mesh.shape["slice"])
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_config(shape: Mapping[str, int]) -> MeshConfig:
    """The settings that make a mesh of these sizes; axes that are not named have size 1."""
    slices, data, fsdp, tensor = (shape.get(axis, 1) for axis in AXES)
    return MeshConfig(data, fsdp, tensor, slices)


def _sizes(config: MeshConfig, devices: int, slices: int) -> list[int]:
    """Of all axes. Raises InputError if they do not multiply to the number of devices."""
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = int(np.prod([s for s in sizes if s != -1]))
    each, left = divmod(devices, slices)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(each // fixed, 1)
    if left or int(np.prod(sizes)) != each:
        given = " x ".join(f"{name} {size}" for name, size in zip(AXES, [slices, *sizes], strict=True))
        raise InputError(f"mesh: {given} does not make {devices} devices; set --mesh.* to match")
    return [slices, *sizes]


def batch_shards(mesh: Mesh) -> int:
    """Parts a micro-batch is cut into; its rows must be a multiple of this."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def tensor_shards(mesh: Mesh) -> int:
    """Parts that heads, feed-forward and vocabulary are cut into."""
    return mesh.shape["tensor"]


def batch_sharding(mesh: Mesh, micro: bool = True) -> NamedSharding:
    """Rows over all but the tensor axis; the axis of micro-batches before them, if any, is not cut."""
    return NamedSharding(mesh, P(None, ROWS) if micro else P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def sharding_of(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array with these logical axes. An axis that does not divide is not cut."""

    def of(name: str | None, size: int) -> Any:
        axes = RULES.get(name)
        shares = int(np.prod([mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes or ())]))
        return axes if axes is not None and size % shares == 0 else None

    return NamedSharding(mesh, P(*map(of, names, shape)))


def parameter_shardings(boxed: Any, mesh: Mesh, units: Mapping[str, int]) -> Any:
    """Shardings for a tree whose leaves carry `.names` (logical axes) and `.value` with a shape.

    units: logical axis -> number of units that must stay whole (heads).
    """

    def of(leaf: Any) -> NamedSharding:
        sizes = [units.get(n, size) for n, size in zip(leaf.names, leaf.value.shape, strict=True)]
        return sharding_of(mesh, leaf.names, sizes)

    return jax.tree.map(of, boxed, is_leaf=lambda x: hasattr(x, "names"))


def tree_lookup(tree: Any) -> Callable[[tuple[str, ...]], NamedSharding]:
    """Path of a leaf -> its sharding."""

    return lambda path: functools.reduce(lambda node, key: node[key], path, tree)


# ---- while a step is traced --------------------------------------------------------------------------


def traced_within(mesh: Mesh | None, step: F, dtype: Any = None) -> F:
    """The step, traced with this mesh: `constrain` and `per_shard` refer to it.

    dtype: of the computation. float32 asks for full-precision matrix products, in this program alone.
    """
    full = dtype is not None and np.dtype(dtype) == np.float32

    @functools.wraps(step)
    def run(*args: Any) -> Any:
        token = _MESH.set(mesh)
        try:
            with jax.default_matmul_precision("highest") if full else nullcontext():
                return step(*args)
        finally:
            _MESH.reset(token)

    return run  # type: ignore[return-value]


def current() -> Mesh | None:
    return _MESH.get()


def platform() -> str:
    """Platform of the devices that a step is traced for: "cpu", "gpu" or "tpu"."""
    mesh = current()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x with the sharding of its logical axes, whatever the compiler would choose."""
    mesh = current()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_of(mesh, names, x.shape))  # type: ignore[return-value]


def per_shard(
    f: Callable[..., jax.Array], names: Sequence[Sequence[str | None]]
) -> Callable[..., jax.Array]:
    """f on each device's part of its arguments, without communication; the result is cut like the first.

    names: logical axes of every argument. For kernels that the compiler can't cut by itself.
    """
    mesh = current()
    if mesh is None or mesh.size == 1:
        return f

    def run(*args: jax.Array) -> jax.Array:
        specs = tuple(sharding_of(mesh, n, x.shape).spec for n, x in zip(names, args, strict=True))
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)

    return run  # type: ignore[return-value]


# ---- arrays of several processes ---------------------------------------------------------------------


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """The rows of a micro-batch that this process's devices hold, in order."""
    places = batch_sharding(mesh, micro=False).addressable_devices_indices_map((rows,))
    return sorted({row for (part,) in places.values() for row in range(*part.indices(rows))})  # type: ignore[misc]


def assemble(tree: Any, where: NamedSharding, rows: int | None = None) -> Any:
    """Global arrays from host arrays, with the sharding `where`.

    rows: number of rows of the global array, where each process has its `local_rows` alone; None where all
    processes have all rows.
    """
    if where.is_fully_addressable:
        return jax.device_put(tree, where)
    axis = next((i for i, part in enumerate(where.spec) if part is not None), 0)

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        shape = x.shape if rows is None else (*x.shape[:axis], rows, *x.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(where, x, shape)

    return jax.tree.map(put, tree)
