"""Compilation of a program in another process, and the results read from it: memory and the final module.

The TPU compiler fixes the memory layout and the final module minutes before it generates machine code. The
machine code is not needed here, so the compiler is stopped at that point unless it is requested.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mllm_align.errors import InputError, one_line
from mllm_align.plan import hlo
from mllm_align.plan.counts import Counts, count
from mllm_align.plan.targets import Sizes
from mllm_align.plan.worker import ENVIRONMENT, METADATA, RESULT, TEXT, Job

FINAL = ".after_optimizations.txt"
LATER = ".after_optimizations_after_buffer_assignment.txt"  # written next: then FINAL is complete
BUFFERS = ".after_optimizations-buffer-assignment.txt"
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products of a splash kernel per block of scores


@dataclass(frozen=True)
class Compiled:
    """memory: bytes on one chip, by kind; None if they exceed a chip's memory. refused: the compiler's
    message in that case. counts: see `counts.count`. metadata: the worker's results from before
    compiling."""

    memory: dict[str, int] | None
    refused: str | None
    counts: Counts | None
    metadata: dict[str, Any]
    seconds: float


def compile_program(job: Job, devices: int, whole: bool) -> Compiled:
    """Compile a job's program; whole: including machine code. Raises InputError if the compiler is missing
    or fails."""
    if job.topology and find_spec("libtpu") is None:
        raise InputError("--topology needs the TPU compiler; install it with pip install libtpu")
    began = time.perf_counter()
    with TemporaryDirectory(prefix="mllm-align-plan-") as folder:
        job = Job(**{**vars(job), "folder": Path(folder)})
        result, metadata = _run(job, stop_early=bool(job.topology) and not whole)
        seconds = time.perf_counter() - began
        if "raised" in result:
            raise result["raised"]
        error = result.get("error")
        if error is not None:
            if "RESOURCE_EXHAUSTED" not in error:
                raise InputError(f"the compiler refuses the {job.program} program: {one_line(error, 500)}")
            return Compiled(None, one_line(error, 400), None, metadata, seconds)
        text = _only(job.folder, FINAL) if job.topology else job.folder / TEXT
        module = hlo.parse(text.read_text(encoding="utf-8"))
        memory = result.get("memory") or buffers(_only(job.folder, BUFFERS).read_text(encoding="utf-8"))

    def kernel(call: hlo.Instruction) -> float | None:
        return splash_flops(call, job.planned, job.program, job.model.decoder.image_block)

    counts = count(module, devices, unknown=job.planned.tokens, kernel_flops=kernel)
    return Compiled(memory, None, counts, metadata, seconds)


def _run(job: Job, stop_early: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    (job.folder / "job.pickle").write_bytes(pickle.dumps(job))
    environment = dict(os.environ)
    if job.topology:
        environment.pop("XLA_FLAGS", None)  # set for this machine's devices
        environment |= ENVIRONMENT
    command = [sys.executable, "-m", "mllm_align.plan.worker", str(job.folder / "job.pickle")]
    with open(job.folder / "stderr", "wb") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr)
        try:
            while process.poll() is None:
                if stop_early and list(job.folder.glob(f"*{LATER}")):
                    return _read(job.folder / RESULT) or {}, _read(job.folder / METADATA) or {}
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    result = _read(job.folder / RESULT)
    if result is None:
        lines = (job.folder / "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "Check fail" in line or re.match(r"\w*Error:|F\d{4} ", line)]
        last = errors[-1] if errors else f"status {process.returncode} and no message"
        raise InputError(f"the compiler of the {job.program} program ended: {one_line(last, 300)}")
    return result, _read(job.folder / METADATA) or {}


def _read(file: Path) -> dict[str, Any] | None:
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _only(folder: Path, ending: str) -> Path:
    """The file with this ending; the largest, if the program was compiled in parts."""
    return max(folder.glob(f"*{ending}"), key=lambda path: path.stat().st_size)


def buffers(text: str) -> dict[str, int]:
    """Bytes of main memory by kind, from the compiler's list of allocations."""
    kinds: dict[str, int] = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries"), 0)
    for line in text.splitlines():
        found = re.match(r"allocation \d+: size (\d+)(.*)", line)
        if not found or ((color := re.search(r"color (\d+)", found[2])) and color[1] != "0"):
            continue
        size, output = int(found[1]), "maybe-live-out" in found[2]
        if " parameter " in found[2]:
            kinds["arguments"] += size
            kinds["aliased"] += size * output
            kinds["outputs"] += size * output
        else:
            kinds["outputs" if output else "temporaries"] += size
    return kinds


def splash_flops(call: hlo.Instruction, planned: Sizes, program: str, image_block: int = 0) -> float | None:
    """FLOPs of a splash attention kernel, from its shapes: all of each block of scores that it visits, as
    if it had no window."""
    name = re.match(r"splash_\w+?_(fwd|dq|dkv)", call.name)
    shapes = call.rest.partition("operand_layout_constraints={")[2].partition("frontend_attributes")[0]
    found = [a.dims for a in hlo.arrays(shapes) if a.dtype != "s8" and len(a.dims) > 2]
    if not name or len(found) < 2:
        return None
    *batch, queries, size = found[0]  # rows (if more than one) and heads come first
    keys = found[1][-2]
    share = _visited(planned, program, queries, keys, size, max(image_block, 1))
    return 2.0 * PRODUCTS[name[1]] * prod(batch) * queries * keys * size * share


def _visited(planned: Sizes, program: str, queries: int, keys: int, size: int, ahead: int) -> float:
    """Share of the blocks of scores in which some query sees some key."""
    from mllm_align.ops.splash import _blocks
    from mllm_align.ops.splash_mask import PromptGroupMask
    from mllm_align.sizes import bucket

    shape = planned.shape
    rows, length = [(bucket(shape.prefix, 32), 0)], 0
    if program != "prefill":
        rows = [
            (prefix, len(view)) for (prefix, _), view in zip(shape.prefixes, planned.views, strict=True)
        ]
        length = shape.response
    found = [each for each in rows if _blocks(each[0] + each[1] * length, width=size)[1] == keys]
    if not found:
        return 1.0  # the vision tower's
    prefix, responses = found[0]
    num_prefix_queries = prefix if queries == keys else 1
    mask = PromptGroupMask(prefix, responses, length, num_prefix_queries, queries, keys, ahead)
    of_q, of_k = (_blocks(each, width=size)[0] for each in (queries, keys))
    visited = [
        mask[q : q + of_q, k : k + of_k].any()
        for q in range(0, queries, of_q)
        for k in range(0, keys, of_k)
    ]
    return sum(map(bool, visited)) / len(visited)
