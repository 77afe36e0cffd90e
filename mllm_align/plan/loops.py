"""Trip counts of the loops of a compiled program. TPU modules do not state them, so they are derived from
the start, the step and the bound of the loop counter."""

from __future__ import annotations

import re

from mllm_align.plan.hlo import Computation, Instruction, Module, number


def trips(module: Module, inside: Computation, loop: Instruction) -> int | None:
    """Trip count of a loop; None if the program does not determine it.

    For a loop that may also end earlier (a conjunction), the maximum.
    """
    known = re.search(r'known_trip_count":\{"n":"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition, body = loop.called("condition"), loop.called("body")
    assert condition and body
    bounds = [
        _bound(module, inside, loop, condition, body, compare) for compare in _compares(module, condition)
    ]
    return min((b for b in bounds if b is not None), default=None)


def _compares(module: Module, name: str) -> list[tuple[str, Instruction]]:
    """(computation, comparison) pairs of a condition and of the computations that it calls."""
    found = []
    for each in module.computations[name].values():
        if each.opcode == "compare":
            found.append((name, each))
        callee = each.called("calls") if each.opcode == "fusion" else None
        if callee:
            found += _compares(module, callee)
    return found


def _bound(module, inside, loop, condition, body, where) -> int | None:
    home, compare = where
    arguments = None
    if home != condition:  # within a fusion, whose parameters are its operands
        caller = next(
            (x for x in module.computations[condition].values() if x.called("calls") == home), None
        )
        if caller is None:
            return None
        arguments = (condition, caller.operands)
    sides = [_affine(module, home, name, arguments) for name in compare.operands]
    direction = re.search(r"direction=(\w+)", compare.rest)
    left, right = sides
    if left is None or right is None or not direction or direction[1] not in ("LT", "GT"):
        return None
    (index, offset), (other, limit) = (left, right) if direction[1] == "LT" else (right, left)
    if index is None:
        return None
    first = _initial(module, inside, loop, index)
    if other is not None:
        last = _initial(module, inside, loop, other)
        if last is None:
            return None
        limit += last
    step = _step(module, body, index)
    if first is None or step <= 0:
        return None
    return max(-(-(limit - offset - first) // step), 0)


def _affine(module, home, name, arguments=None, depth=0) -> tuple[int | None, int] | None:
    """A scalar as (index into the computation's tuple or None, added constant)."""
    each = module.computations[home].get(name)
    if each is None or depth > 20:
        return None

    def of(operand):
        return _affine(module, home, operand, arguments, depth + 1)

    if each.opcode == "constant":
        return (None, int(each.operands[0])) if re.fullmatch(r"-?\d+", each.operands[0]) else None
    if each.opcode == "get-tuple-element":
        return int(number(each.rest, "index", "0")), 0
    if each.opcode == "parameter" and arguments:
        caller, operands = arguments
        return _affine(module, caller, operands[int(each.operands[0])], None, depth + 1)
    if each.opcode in ("copy", "convert", "bitcast", "reshape", "copy-done", "copy-start"):
        return of(each.operands[0])
    if each.opcode == "add":
        left, right = (of(name) for name in each.operands)
        if left is None or right is None or None not in (left[0], right[0]):
            return None
        return (right[0] if left[0] is None else left[0]), left[1] + right[1]
    if each.opcode == "fusion" and (callee := each.called("calls")):
        return _affine(module, callee, module.roots[callee], (home, each.operands), depth + 1)
    return None


def _initial(module, inside, loop, index) -> int | None:
    start = inside.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return None
    name = next(n for n, c in module.computations.items() if c is inside)
    value = _affine(module, name, start.operands[index])
    return value[1] if value and value[0] is None else None


def _step(module, body, index) -> int:
    root = module.computations[body][module.roots[body]]
    if root.opcode != "tuple":
        return 1
    value = _affine(module, body, root.operands[index])
    return value[1] if value and value[0] == index else 1
