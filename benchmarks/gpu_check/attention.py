"""cuDNN's attention against XLA's, outputs and gradients, from shapes of the published models to odd ones.

The reference for both is XLA's implementation in float32, on the same 16-bit inputs. The remaining
differences are bfloat16 roundings, 2^-9 of a value each, of softmax weights, of their gradients and of
results: a few of them stay within 2% of a tensor's norm. The error of XLA's implementation in bfloat16 is
reported beside it. Without an NVIDIA device, the same calls run through XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_check.differ import largest, relative
from gpu_check.lines import Figures, LeftOut, Lines, check
from mllm_align.ops import attention, cudnn

RELATIVE_16, LARGEST_16 = 0.02, 0.05  # of the tensor's norm; of its largest value
RELATIVE_32 = 1e-5
NAMES = ("output", "q", "k", "v")


@dataclass(frozen=True)
class Case:
    """Rows [prefix | response 1 | ...]. hidden: prefix places at each row's end that nobody sees, from 0
    to this; -1 hides a whole row too. last: only the prefix's last row asks, as in the last block."""

    name: str
    heads: int
    groups: int
    size: int
    prefix: int
    responses: int
    length: int
    rows: int = 2
    hidden: int = 0
    last: bool = False


LARGE = (
    Case("LLaVA-1.6-7B, 2 responses", 32, 32, 128, 2879, 2, 101, 1),
    Case("8 key heads of 128, 1 response, padded", 32, 8, 128, 1024, 1, 128, 2, 200),
    Case("last block, 8 key heads of 128, 2 responses", 32, 8, 128, 1023, 2, 129, 2, 0, True),
    Case("1 key head of 64, 3 responses, odd lengths", 7, 1, 64, 301, 3, 67, 3, -1),
    Case("heads of 96, 2 responses, padded", 4, 2, 96, 577, 2, 33, 2, 77),
    Case("prefill alone, heads of 128", 32, 8, 128, 2048, 0, 0, 2, 300),
    Case("heads of 32, 3 responses", 4, 2, 32, 65, 3, 8, 2, 9),
)
SMALL = (
    Case("2 key heads of 16, 2 responses, padded", 4, 2, 16, 37, 2, 9, 2, 11),
    Case("1 key head of 8, 3 responses, a row unseen", 3, 1, 8, 21, 3, 7, 3, -1),
    Case("last block, 1 response", 2, 2, 8, 19, 1, 6, 2, 0, True),
    Case("prefill alone", 4, 2, 16, 64, 0, 0, 2, 13),
)
TOWER, SMALL_TOWER = (5, 577, 16, 64), (2, 17, 2, 8)  # tiles, tokens, heads, size of a head


def run(lines: Lines, work: Path, tiny: bool) -> None:
    how: cudnn.Implementation = "cudnn" if jax.devices()[0].platform == "gpu" else "xla"
    if how == "xla":
        lines("cudnn", no_device)
    for case in SMALL if tiny else LARGE:
        lines(f"{how}: {case.name}", lambda c=case: group(c, how), needs=0 if tiny else 8)
    shape = SMALL_TOWER if tiny else TOWER
    lines(f"{how}: tower, {shape}", lambda: tower(shape, how))


def no_device() -> Figures:
    raise LeftOut("no NVIDIA device")


def pulled(attend: Callable, arrays: Any, dtype: Any) -> list[np.ndarray]:
    """Output and gradients of q, k, v; float32."""

    @jax.jit
    def both(q, k, v, cotangent):
        out, pull = jax.vjp(attend, q, k, v)
        return (out, *pull(cotangent))

    with jax.default_matmul_precision("highest"):
        found = both(*(jnp.asarray(x, dtype) for x in arrays))
    return [np.asarray(x, np.float32) for x in found]


def group(case: Case, implementation: cudnn.Implementation) -> Figures:
    rng = np.random.default_rng(0)
    total = case.prefix + case.responses * case.length
    visible = rng.random((case.rows, total)) < 0.9  # responses may have holes, and end early
    real = case.prefix - rng.integers(0, max(case.hidden, 0) + 1, case.rows)
    real[0] = case.prefix
    visible[:, : case.prefix] = np.arange(case.prefix) < real[:, None]
    if case.hidden < 0:
        visible[-1] = False
    place = np.arange(total)
    late = case.prefix + (place - case.prefix) % max(case.length, 1)
    at = np.broadcast_to(np.where(place < case.prefix, place, late), visible.shape).astype(np.int32)
    some = slice(case.prefix - 1 if case.last else 0, None)
    asking = at[:, some]

    def definition(q, k, v):
        return attention.prompt_group_attention(
            q,
            k,
            v,
            asking,
            at,
            visible,
            case.prefix,
            case.responses,
            span=total,  # the least to compile
        )

    def kernel(q, k, v):
        return cudnn.prompt_group_attention(
            q, k, v, visible, case.prefix, case.responses, implementation=implementation
        )

    queries = (case.rows, asking.shape[1], case.heads, case.size)
    keys = (case.rows, total, case.groups, case.size)
    # who sees no key counts for nothing: the definition gives it a mean, the kernels zeros
    sees = visible.any(1)[:, None, None, None]
    return compared(
        definition, kernel, [rng.standard_normal(s) for s in (queries, keys, keys, queries)], sees
    )


def tower(shape: tuple[int, int, int, int], implementation: cudnn.Implementation) -> Figures:
    rng = np.random.default_rng(0)

    def kernel(q, k, v):
        return cudnn.full_attention(q, k, v, implementation=implementation)

    arrays = [rng.standard_normal(shape) for _ in range(4)]
    return compared(attention.full_attention, kernel, arrays, np.ones((shape[0], 1, 1, 1)))


def compared(definition: Callable, kernel: Callable, arrays: list, sees: np.ndarray) -> Figures:
    """arrays: q, k, v and a cotangent."""
    *qkv, cotangent = arrays
    arrays = [*qkv, cotangent * sees]
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays]

    def masked(found: list) -> list:
        return [found[0] * sees, *found[1:]]

    exact = masked(pulled(definition, arrays, jnp.float32))
    found = masked(pulled(kernel, arrays, jnp.bfloat16))
    rounded = masked(pulled(definition, arrays, jnp.bfloat16))
    checks, own = {}, {}
    for name, a, b, c in zip(NAMES, found, exact, rounded, strict=True):
        checks[f"{name}_relative"] = check(relative(a, b), RELATIVE_16)
        checks[f"{name}_largest"] = check(largest(a, b) / np.abs(b).max(), LARGEST_16)
        own[name] = relative(c, b)
    if jax.devices()[0].platform != "gpu":  # through XLA, the calls can be made in float32
        wide = masked(pulled(kernel, arrays, jnp.float32))
        for name, a, b in zip(NAMES, wide, exact, strict=True):
            checks[f"{name}_relative_float32"] = check(relative(a, b), RELATIVE_32)
    return {"xla_bfloat16_relative": own, "checks": checks}
