"""Costs of a compiled program on one device: matrix FLOPs, memory traffic and collectives.

Loop bodies count as often as they run. XLA's own cost analysis counts the body of a loop once, and a
decoder is a loop over its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from mllm_align.plan.hlo import Computation, Instruction, Module, number, replica_groups
from mllm_align.plan.loops import trips
from mllm_align.plan.traffic import is_kernel, is_piece, traffic

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass
class Collective:
    """All collectives of the same kind and group in a program. Bytes are of one device and one run of the
    program.

    operand, output: bytes of inputs and outputs. sent: bytes that each device sends in a ring algorithm:
    (n-1)/n of the whole array, twice that for an all-reduce.
    """

    kind: str
    group: int
    slices: int
    """Slices of a pod that the group spans: with more than 1, data crosses the network between slices."""
    count: float = 0
    operand: float = 0
    output: float = 0
    sent: float = 0


@dataclass
class Counts:
    """Counts of one device. flops: of matrix products and kernels. hbm_bytes: main memory traffic."""

    flops: float = 0
    hbm_bytes: float = 0
    collectives: dict[tuple[str, int, int], Collective] = field(default_factory=dict)
    unknown_loops: int = 0
    """Loops of unknown length; counted as running `unknown` times."""
    unknown_kernels: int = 0
    """Kernels of unknown cost."""


def count(
    module: Module,
    devices: int = 1,
    unknown: float = 1,
    kernel_flops: Callable[[Instruction], float | None] = lambda kernel: None,
) -> Counts:
    """Count the costs of a module.

    devices: number of devices that run it. unknown: assumed length of loops whose length depends on data.
    kernel_flops: FLOPs of a custom call without a cost estimate, or None.
    """
    counter = _Counter(module, devices, unknown, kernel_flops)
    counter.computation(module.entry, 1.0, fused=False)
    return counter.total


class _Counter:
    def __init__(self, module, devices, unknown, kernel_flops):
        self.module, self.devices, self.unknown = module, devices, unknown
        self.kernel_flops, self.total = kernel_flops, Counts()

    def computation(self, name: str, times: float, fused: bool) -> None:
        inside = self.module.computations[name]
        for each in inside.values():
            self.instruction(name, inside, each, times, fused)

    def instruction(self, home: str, inside: Computation, each: Instruction, times: float, fused: bool):
        code = each.opcode
        if code in ("fusion", "call", "async-start"):
            callee = each.called("calls") or each.called("to_apply")
            if callee:
                self.computation(callee, times, fused or code == "fusion")
        elif code == "while":
            known = trips(self.module, inside, each)
            self.total.unknown_loops += known is None
            body = each.called("body")
            assert body
            self.computation(body, times * (self.unknown if known is None else known), fused)
        elif code == "conditional":  # all branches are counted: an upper bound
            listed = re.search(r"branch_computations=\{([^}]*)\}", each.rest)
            names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
            names += [n for n in map(each.called, ("true_computation", "false_computation")) if n]
            for name in names:
                self.computation(name, times, fused)
        elif code.removesuffix("-start") in COLLECTIVES:
            self.collective(home, inside, each, times)
        elif code == "send":
            self.between_slices(inside, each, times)
        self.total.flops += times * self.flops(inside, each)
        if not fused:
            self.total.hbm_bytes += times * traffic(self.module, inside, each)

    def flops(self, inside: Computation, each: Instruction) -> float:
        if each.opcode == "dot":
            return dot_flops(inside, each)
        if each.opcode == "convolution":
            return convolution_flops(inside, each)
        if each.opcode == "reduce":
            return summed_products(inside, each)
        if each.opcode == "custom-call" and is_kernel(each):
            estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', each.rest)
            # an estimate of 0 counts as none: every kernel computes something
            known = float(estimate[1]) if estimate and int(estimate[1]) else self.kernel_flops(each)
            self.total.unknown_kernels += known is None
            return known or 0.0
        return 0.0

    def collective(self, home: str, inside: Computation, each: Instruction, times: float) -> None:
        if is_piece(each):
            return
        kind = each.opcode.removesuffix("-start")
        operand = sum(a.bytes for name in each.operands for a in inside[name].arrays)
        output = sum(a.bytes for a in each.arrays)
        if each.opcode.endswith("-start"):  # its result includes the operands, if they differ from it
            output = max(output - operand, operand) if kind != "all-reduce" else operand
        if kind == "all-reduce" and (share := self._scattered(home, inside, each)):
            kind, output = "reduce-scatter", share
        size = 2 if kind == "collective-permute" else len(replica_groups(each.rest, self.devices)[0])
        if size > 1:
            self._add(kind, size, 1, times, operand, output)

    def between_slices(self, inside: Computation, each: Instruction, times: float) -> None:
        """Data that a chip sends through its host to other slices of a pod (megascale)."""
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', each.rest)
        target = re.search(r'_xla_megascale_target="\{([^}]*)\}', each.rest)
        if kind and target:
            slices = len(target[1].split(","))
            if ":" in target[1]:
                first, last = target[1].split(":")
                slices = int(last) - int(first) + 1
            size = inside[each.operands[0]].arrays[0].bytes
            self._add(kind[1].lower().replace("_", "-"), slices, slices, times, size, size)

    def _add(self, kind: str, size: int, slices: int, times: float, operand: float, output: float):
        key = (kind, size, slices)
        into = self.total.collectives.setdefault(key, Collective(*key))
        into.count += times
        into.operand += times * operand
        into.output += times * output
        into.sent += times * _sent(kind, operand, output, size)

    def _scattered(self, home: str, inside: Computation, each: Instruction) -> int:
        """Bytes of the share that a device keeps if an all-reduce is part of a fused reduce-scatter; else
        0."""
        root = inside.get(self.module.roots.get(home, ""))
        while root is not None and root.opcode in ("bitcast", "copy", "reshape"):
            root = inside.get(root.operands[0])
        if root is None or root.opcode != "dynamic-slice":
            return 0
        source = inside.get(root.operands[0])
        while source is not None and source.opcode in ("bitcast", "copy", "reshape"):
            source = inside.get(source.operands[0])
        return root.arrays[0].bytes if source is each else 0


def _sent(kind: str, operand: float, output: float, size: int) -> float:
    if kind == "collective-permute":
        return operand
    whole = output if kind == "all-gather" else operand
    return whole * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def dot_flops(inside: Computation, each: Instruction) -> float:
    """2 m n k."""
    left = inside[each.operands[0]].arrays[0].dims
    named = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
    contracted = [left[int(d)] for d in named[1].split(",") if d] if named else []
    return 2.0 * np.prod(each.arrays[0].dims, dtype=float) * np.prod(contracted, dtype=float)


def summed_products(inside: Computation, each: Instruction) -> float:
    """FLOPs of a sum over products, the form of a matrix-vector product on TPUs; 0 for other sums."""
    source = inside.get(each.operands[0])
    while source is not None and source.opcode in ("bitcast", "convert", "copy", "reshape"):
        source = inside.get(source.operands[0])
    known = source is not None and source.opcode == "multiply" and source.operands[0] != source.operands[1]
    return 2.0 * np.prod(source.arrays[0].dims, dtype=float) if source and known else 0.0


def convolution_flops(inside: Computation, each: Instruction) -> float:
    """FLOPs of products with elements of the input, without padding: on TPUs, batched matrix products are
    convolutions over windows that consist almost entirely of padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
    assert labels
    left, right = (inside[name].arrays[0].dims for name in each.operands[:2])
    out, of_out = each.arrays[0].dims, labels[3]
    groups = int(number(each.rest, "feature_group_count", "1"))
    batches = int(number(each.rest, "batch_group_count", "1"))
    window = re.search(r"window=\{([^}]*)\}", each.rest)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(set(of_out) & set("0123456789"))
    valid = 1
    for i, axis in enumerate(spatial):

        def setting(name: str, default: str, i: int = i) -> str:
            return settings[name].split("x")[i] if name in settings else default

        valid *= _valid_products(
            left[labels[1].index(axis)],
            right[labels[2].index(axis)],
            out[of_out.index(axis)],
            int(setting("stride", "1")),
            int(setting("pad", "0_0").split("_")[0]),
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    inputs = left[labels[1].index("f")] // groups
    rows = left[labels[1].index("b")] // batches
    return 2.0 * inputs * out[of_out.index("f")] * rows * valid


@cache
def _valid_products(size, kernel, out, stride, low, dilate, kernel_dilate) -> int:
    """Number of pairs (output position, window position) that access an element of the input."""
    starts = np.arange(out, dtype=np.int64) * stride - low
    total = 0
    for k in range(kernel):
        at = starts + k * kernel_dilate
        total += int(((at >= 0) & (at % dilate == 0) & (at // dilate < size)).sum())
    return total
