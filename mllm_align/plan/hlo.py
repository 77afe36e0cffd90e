"""Parser of the optimised HLO text of a compiled program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

SIZES = {"pred": 1, "c64": 8, "c128": 16, "token": 0, "opaque": 0}


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    space: int
    """Memory space: 0 is the device's main memory; others are on chip or on the host."""

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        size = SIZES[self.dtype] if self.dtype in SIZES else int(bits[0]) / 8 if bits else 0
        return int(np.prod(self.dims, dtype=np.int64) * size)


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    """The text after the operands: attributes, metadata, backend config."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    roots: dict[str, str]
    entry: str


def parse(text: str) -> Module:
    """Parse HLO text. Raises ValueError for text without an entry computation.

    Newer text refers to an element of a tuple as %x#1, older text has an instruction for it. The result
    always has the instruction.
    """
    computations: dict[str, Computation] = {}
    roots: dict[str, str] = {}
    entry, current, name = "", {}, ""
    for line in _lines(text):
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(|\{)", line):
            name, current = start[2], {}
            computations[name] = current
            entry = name if start[1] else entry
        elif instruction := _instruction(line.strip()):
            for operand in instruction.operands:
                _take_element(current, operand)
            current[instruction.name] = instruction
            if line.startswith("  ROOT "):
                roots[name] = instruction.name
    if not entry:
        raise ValueError("the text has no ENTRY computation")
    return Module(computations, roots, entry)


def _lines(text: str) -> Iterator[str]:
    """Headers of computations, and instructions; an instruction's text may span several lines."""
    pending = ""
    for line in text.splitlines():
        if re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            if pending:
                yield pending
            pending = line
        elif line.endswith("{") and re.match(r"(ENTRY )?%?[\w.\-]+ [({]", line):
            yield line
        elif line == "}" and pending:
            yield pending
            pending = ""
        elif pending:
            pending += line


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    at = head.end()
    end = _closed(line, at) if line[at] == "(" else line.index(" ", at)
    shape = line[at:end]
    opcode = re.match(r" ([\w\-]+)\(", line[end:])
    if not opcode:
        return None
    start = end + opcode.end() - 1
    stop = _closed(line, start)
    operands = tuple(re.findall(r"%([\w.\-]+(?:#\d+)*)", line[start:stop]))
    if opcode[1] in ("constant", "parameter"):
        operands = (line[start + 1 : stop - 1],)  # the constant's value or the parameter's number
    return Instruction(head[1], opcode[1], shape, operands, line[stop:])


def _take_element(inside: Computation, name: str) -> None:
    """Add the get-tuple-element instruction for an operand such as x#1."""
    parent, mark, index = name.rpartition("#")
    if mark and name not in inside:
        _take_element(inside, parent)
        shape = _elements(inside[parent].shape)[int(index)]
        inside[name] = Instruction(name, "get-tuple-element", shape, (parent,), f", index={index}")


def _elements(shape: str) -> list[str]:
    """Shapes of a tuple's elements."""
    found, depth = [""], 0
    for letter in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [each.strip() for each in found]


def _closed(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in re.finditer(r"[()]", text[start:]):
        depth += 1 if at[0] == "(" else -1
        if not depth:
            return start + at.end()
    return len(text)


@lru_cache(maxsize=100_000)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape in XLA's notation; those of a tuple in order."""
    found = re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?", shape)
    out = []
    for dtype, dims, layout in found:
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.strip("<=")) for d in dims.split(",") if d)
        out.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(out)


def number(text: str, name: str, default: str) -> str:
    """An integer attribute of an instruction."""
    found = re.search(rf"\b{name}=(\d+)", text)
    return found[1] if found else default


# ---- groups of devices ----


def replica_groups(rest: str, devices: int) -> np.ndarray:
    """Device groups of a collective [groups, size], as indices into the device assignment, from XLA's three
    notations: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['a'=2,'b'=2] {'a'}."""
    text = rest.partition("replica_groups=")[2]
    if named := re.match(
        r"mesh\[([^\]]*)\](?:,? ?device_ids=\((\[.*?\](?:T\([\d,]*\))?)\))? ?\{([^}]*)\}", text
    ):
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        sizes = [int(size) for _, size in axes]
        ids = _iota(f"[{','.join(map(str, sizes))}]<={named[2]}") if named[2] else None
        ids = np.arange(np.prod(sizes)) if ids is None else np.ravel(ids)
        chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3])
        return _along(ids.reshape(sizes), [name for name, _ in axes], chosen)
    if re.match(r"\[[\d,]+\]<=", text):
        return _iota(text)
    listed = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
    groups = (
        [[int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []
    )
    return np.array(groups or [range(devices)])


def _along(ids: np.ndarray, names: list[str], chosen: list[tuple[str, str, str]]) -> np.ndarray:
    """Groups along the chosen axes; 'a':(p)s is the sub-axis of size s of axis a, after sub-axes of size
    p."""
    split: list[tuple[str, int, bool]] = []
    for name, size in zip(names, ids.shape, strict=True):
        parts = [(int(p), int(s)) if p else (1, size) for n, p, s in chosen if n == name]
        done = 1
        for before, part in sorted(parts):
            split += [(name, before // done, False)] if before > done else []
            split.append((name, part, True))
            done = before * part
        if done < size:
            split.append((name, size // done, False))
    grid = ids.reshape([size for _, size, _ in split])
    inner = [i for i, (_, _, taken) in enumerate(split) if taken]
    outer = [i for i in range(len(split)) if i not in inner]
    width = int(np.prod([split[i][1] for i in inner])) if inner else 1
    return grid.transpose(outer + inner).reshape(-1, width)


def _iota(text: str) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): arange, reshaped to [4, 2], transposed by (1, 0), reshaped to [2, 4]."""
    found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found, text
    shape, first = ([int(d) for d in found[i].split(",")] for i in (1, 2))
    ids = np.arange(np.prod(first)).reshape(first)
    if found[3]:
        ids = ids.transpose([int(d) for d in found[3].split(",")])
    return ids.reshape(shape)
