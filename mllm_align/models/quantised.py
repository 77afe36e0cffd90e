"""A frozen base with the matrices of its blocks in int8.

Every output channel o of a matrix w [i, o] is rounded to whole multiples of its own scale:

    scale_o = max_i |w_io| / 127,    values_io = round(w_io / scale_o)

(symmetric, by the absolute maximum; arXiv 2208.07339, section 2.1). The scale is rounded to the dtype of
the computation before it divides, so rounding it costs nothing.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mllm_align.ops.linear import Quantised

LARGEST = 127
BLOCK = 128  # channels


def with_int8(boxed: Any) -> Any:
    """A model's parameters as shapes boxed with their logical axes, the matrices of the blocks of decoder
    and tower in int8: those are nearly all of a model.

    Embedding and head stay as they are, because errors of a head's column move one token's log-probs alone;
    so do projector (it is trained), norms, biases and the embedding of patches.
    """
    return jax.tree_util.tree_map_with_path(_kept, boxed, is_leaf=lambda x: hasattr(x, "names"))


def _kept(path: Any, leaf: Any) -> Any:
    keys = [key.key for key in path]
    block = keys[0] in ("decoder", "vision_tower") and keys[1].startswith(("layers", "last"))
    if not (block and keys[-1] == "kernel"):
        return leaf
    axis = int(leaf.names[0] == "layers")  # of the inputs

    def boxed(what: tuple, names: tuple, dtype: Any) -> nn.LogicallyPartitioned:
        return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(what, dtype), names)  # type: ignore[arg-type]

    shape, names = leaf.value.shape, leaf.names
    sizes, axes = ((*each[:axis], *each[axis + 1 :]) for each in (shape, names))
    return Quantised(boxed(shape, names, jnp.int8), boxed(sizes, axes, leaf.value.dtype))


def round_into(place: np.ndarray, kernel: np.ndarray, within: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """Writes a part of a matrix [i, ...] into `place`, int8; returns the scales [...] of all its channels.

    A few channels at a time: what is cast for them stays in the cache, which halves the time.
    """
    blocks = [slice(at, at + BLOCK) for at in range(0, kernel.shape[-1], BLOCK)]
    scales = [scale_of(kernel[..., block].astype(np.float32), dtype) for block in blocks]
    scale = np.concatenate(scales, axis=-1)
    part, own = kernel[within], scale[within[1:]]
    for block in blocks:
        place[..., block] = values_of(part[..., block].astype(np.float32), own[..., block])
    return scale


def scale_of(kernel: np.ndarray, dtype: Any) -> np.ndarray:
    """[i, ...] float32 -> [...] in `dtype`; 1 for a channel of zeros, or of numbers below 1e-36."""
    scale = np.maximum(kernel.max(0), -kernel.min(0)) / LARGEST
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale).astype(dtype)


def values_of(kernel: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[i, ...] int8. What is not finite is lost here, but makes its channel's scale not finite."""
    with np.errstate(invalid="ignore"):
        ratio = kernel / scale.astype(np.float32)
        return np.rint(ratio, out=ratio).astype(np.int8)


def count(params: Any) -> int:
    """Numbers of the model's own: scales are not counted."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantised))
    return sum((x.values if isinstance(x, Quantised) else x).size for x in leaves)
