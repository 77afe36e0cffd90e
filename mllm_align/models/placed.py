"""Tensors of a checkpoint as arrays on devices: read slice by slice, stacked, rounded to int8."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mllm_align.models.names import Entry
from mllm_align.models.quantised import round_into
from mllm_align.ops.linear import Quantised

Read = Callable[[str], np.ndarray]
Within = tuple[slice, ...]


def placed(parts: list[Entry], read: Read, dtype: np.dtype, where: Any) -> Any:
    """A leaf of the parameter tree where it lives. parts: the tensor that it holds, or those of its layers.
    read: by name, as stored. where: a sharding, or a `Quantised` of two for a matrix kept in int8."""
    if isinstance(where, Quantised):
        return _quantised(parts, read, dtype, where)

    def fill(place: np.ndarray, entry: Entry, within: Within) -> None:
        place[...] = entry.to_ours(read(entry.name))[within]

    return _stacked(parts, dtype, where, fill)


def _quantised(parts: list[Entry], read: Read, dtype: np.dtype, where: Quantised) -> Quantised:
    """The scales are those of whole channels, however they are cut."""
    scales: dict[int | None, np.ndarray] = {}

    def fill(place: np.ndarray, entry: Entry, within: Within) -> None:
        scales[entry.layer] = round_into(place, entry.to_ours(read(entry.name)), within, dtype)

    values = _stacked(parts, np.dtype(np.int8), where.values, fill)
    each = [scales[entry.layer] for entry in parts]
    scale = each[0] if parts[0].layer is None else np.stack(each)
    return Quantised(values, jax.make_array_from_callback(scale.shape, where.scale, lambda at: scale[at]))


def _stacked(
    parts: list[Entry], dtype: np.dtype, where: Any, fill: Callable[[np.ndarray, Entry, Within], None]
) -> jax.Array:
    """fill: writes a device's share of a tensor into its place."""
    shape = parts[0].to_ours(np.empty(parts[0].shape, bool)).shape
    stacked = parts[0].layer is not None
    if stacked:
        shape = (len(parts), *shape)

    def share(index: Within) -> np.ndarray:
        """One device's share, in memory once: tensor by tensor into a place that the device can keep."""
        out = _aligned([len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)], dtype)
        chosen, within = (parts[index[0]], index[1:]) if stacked else (parts, index)
        for place, entry in zip(out if stacked else [out], chosen, strict=True):
            fill(place, entry, within)
        return out

    return jax.make_array_from_callback(shape, where, share)  # type: ignore[arg-type]


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that JAX takes over on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)
