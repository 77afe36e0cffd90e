"""Bytes that the instructions of a compiled program read and write in a device's main memory."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mllm_align.plan.hlo import Array, Computation, Instruction, Module

# Opcodes that move no data themselves, or are counted in their computation or at their start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
FREE |= {
    "after-all",
    "send",
    "recv",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "async-start",
    "async-update",
    "iota",
}
SLICES = {"dynamic-slice", "slice", "gather"}


def is_kernel(each: Instruction) -> bool:
    """Whether a custom call is a Pallas (Mosaic or Triton) kernel."""
    return "tpu_custom_call" in each.rest or "triton" in each.rest


def is_piece(each: Instruction) -> bool:
    """Whether an instruction goes on with a collective that was counted at its start."""
    piece = re.search(r'"flag_start":"(-?\d+)"', each.rest)
    return piece is not None and piece[1] != "-1"


def traffic(module: Module, inside: Computation, each: Instruction) -> float:
    """Bytes that an instruction reads and writes in main memory, each operand once.

    For an array that is sliced or updated in place, only the slice counts. On-chip arrays are free.
    """
    code = each.opcode
    if code in FREE or code.endswith("-done"):
        return 0
    if code == "custom-call" and not is_kernel(each):
        return 0
    operands = [inside[name] for name in each.operands if name in inside]
    if code in SLICES:
        return _main(each.arrays) + (_main(each.arrays) if _in_main(operands[0]) else 0)
    if code == "dynamic-update-slice":
        return 2 * _main(operands[1].arrays) if _in_main(each) else 0
    if code == "copy-start":
        return _main(each.arrays[:1]) + _main(operands[0].arrays)
    if code == "fusion" and (callee := each.called("calls")):
        return _fusion_traffic(module, module.computations[callee], module.roots[callee], each, operands)
    return _main(each.arrays) + sum(_main(o.arrays) for o in operands)


def _fusion_traffic(module: Module, fused: Computation, root: str, each, operands) -> float:
    total = 0.0
    for inner in fused.values():
        if inner.opcode == "parameter" and _in_main(operand := operands[int(inner.operands[0])]):
            size = _main(operand.arrays)
            total += min(_read(module, fused, inner.name, size), size)
    last = fused[root]
    results = [fused[n] for n in last.operands] if last.opcode == "tuple" else [last]
    for result, array in zip(results, each.arrays, strict=False):
        # parameters among the results stay where they are
        if not array.space and result.opcode != "parameter" and not is_piece(result):
            total += min(_written(module, fused, result, array.bytes), array.bytes)
    return total


def _read(module: Module, fused: Computation, name: str, size: float) -> float:
    """Bytes read from a fusion's parameter of `size` bytes; only the slices, if it is sliced."""
    total = 0.0
    for user in fused.values():
        if name not in user.operands or user.opcode in ("parameter", "constant", "tuple") or is_piece(user):
            continue
        first = user.operands[0] == name
        if user.opcode == "bitcast" or _retiled(module, user):
            total += _read(module, fused, user.name, size)
        elif user.opcode in SLICES and first:
            total += sum(a.bytes for a in user.arrays)
        elif user.opcode == "fusion" and (callee := user.called("calls")):
            inside = module.computations[callee]
            index = str(user.operands.index(name))
            inner = next(i for i in inside.values() if i.opcode == "parameter" and i.operands[0] == index)
            total += _read(module, inside, inner.name, size)
        elif not (user.opcode == "dynamic-update-slice" and first):
            return size
    return total


def _retiled(module: Module, each: Instruction) -> bool:
    """Whether a fusion inside another names the same bytes by another tiling, as of int8 arrays."""
    callee = each.called("calls") if "output_to_operand_aliasing={{}: (0" in each.rest else None
    return callee is not None and module.computations[callee][module.roots[callee]].opcode == "copy"


def _written(module: Module, fused: Computation, result: Instruction, size: float) -> float:
    """Bytes written to a fusion's result of `size` bytes; only the update, if it is updated in place."""
    while result.opcode == "bitcast" and result.operands[0] in fused:
        result = fused[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return sum(a.bytes for a in fused[result.operands[1]].arrays)
    if result.opcode == "fusion" and (callee := result.called("calls")):
        inside = module.computations[callee]
        return _written(module, inside, inside[module.roots[callee]], size)
    return size


def _in_main(each: Instruction) -> bool:
    return bool(each.arrays) and not each.arrays[0].space


def _main(arrays: Sequence[Array]) -> int:
    return sum(a.bytes for a in arrays if not a.space)
