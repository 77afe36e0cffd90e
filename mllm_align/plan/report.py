"""The plan of compiled programs on a machine: memory, a lower bound on time, and a verdict in words."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from mllm_align.plan.chips import GIB, Topology
from mllm_align.plan.compiled import Compiled
from mllm_align.plan.counts import Counts
from mllm_align.sharding import mesh_config
from mllm_align.training.fitting import ROOM, total


@dataclass(frozen=True)
class ProgramPlan:
    """One program on one machine. Bytes and FLOPs are of one chip and one run of the program.

    memory: bytes by kind, None if the compiler refuses. held: bytes that an online run keeps resident
    besides. needed: bytes in use at the same time. model_flops: FLOPs of the model's mathematics. flops: of
    all matrix products that the program runs, including padding and recomputation. bound: lower bound on
    the time in seconds: the slowest part at published peak rates, with the others overlapped; limit: that
    part. A bound, not a measurement.
    """

    program: str
    rows: int
    fits: bool
    memory: dict[str, int] | None
    held: int
    needed: int | None
    usable: float | None
    refused: str | None
    model_flops: float
    flops: float = 0
    hbm_bytes: float = 0
    collectives: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    bound: float | None = None
    limit: str | None = None
    rates: dict[str, float] = field(default_factory=dict)
    cache: int | None = None
    notes: list[str] = field(default_factory=list)
    compile_seconds: float = 0

    @property
    def has_room(self) -> bool:
        """Whether a run under `remat auto` takes it to fit."""
        return bool(self.needed and self.usable and self.needed <= ROOM * self.usable)


@dataclass(frozen=True)
class Plan:
    """Programs of a config on a machine. mesh: devices along each axis. shape: padded prefix and response
    tokens and tiles. tokens: maximum of a generated response. remat: of the planned step; with `auto`, the
    one chosen of `policies`, the plans of all that were tried."""

    topology: str
    vendor_name: str | None
    chips: int
    model: str
    mesh: dict[str, int]
    shape: dict[str, Any]
    tokens: int
    programs: list[ProgramPlan]
    kept_whole: list[str]
    verdict: str
    remat: str = ""
    policies: dict[str, ProgramPlan] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def times(counts: Counts, where: Topology) -> dict[str, float]:
    """Lower bounds in seconds on the time of each part of a program, on one chip."""
    chip = where.chip
    within = sum(c.sent for c in counts.collectives.values() if c.slices == 1)
    between = sum(c.sent for c in counts.collectives.values() if c.slices > 1)
    parts = {"compute": counts.flops / chip.peak, "memory": counts.hbm_bytes / chip.bandwidth}
    if within:
        parts["interconnect"] = within / (max(where.links, 1) * chip.link)
    if between:
        parts["network"] = between / chip.network
    return parts


def program_plan(
    program: str,
    compiled: Compiled,
    where: Topology | None,
    model_flops: float,
    produced: dict[str, float],
    min_bytes: float = 0,
) -> ProgramPlan:
    """The plan of a compiled program. produced: numbers of items per run (tokens, pairs), for rates.
    min_bytes: lower bound on the bytes that a run reads from a chip's memory."""
    usable = where.chip.usable if where else compiled.metadata.get("usable")
    resident = compiled.metadata.get("resident", 0)
    rows, seconds = compiled.metadata["rows"], round(compiled.seconds, 1)
    if compiled.memory is None or compiled.counts is None:
        return ProgramPlan(
            program,
            rows,
            False,
            None,
            resident,
            None,
            usable,
            compiled.refused,
            model_flops,
            compile_seconds=seconds,
        )
    counts, needed = compiled.counts, total(compiled.memory) + resident
    parts = times(counts, where) if where else {}
    limit = max(parts, key=lambda name: parts[name]) if parts else None
    bound = parts[limit] if limit else None
    notes = []
    if counts.unknown_loops:
        notes.append(f"{counts.unknown_loops} loops of unknown length counted at the maximum of tokens")
    if counts.unknown_kernels:
        notes.append(f"{counts.unknown_kernels} kernels of unknown cost counted as nothing")
    return ProgramPlan(
        program=program,
        rows=rows,
        fits=usable is None or needed <= usable,
        memory=compiled.memory,
        held=resident,
        needed=needed,
        usable=usable,
        refused=None,
        model_flops=model_flops,
        flops=counts.flops,
        hbm_bytes=max(counts.hbm_bytes, min_bytes),
        collectives=[asdict(c) for c in counts.collectives.values()],
        parts=parts,
        bound=bound,
        limit=limit,
        rates={f"{what}/s": count / bound for what, count in produced.items()} if bound else {},
        cache=compiled.metadata.get("cache"),
        notes=notes,
        compile_seconds=seconds,
    )


def verdict(programs: list[ProgramPlan], config: Any, mesh: dict[str, int], where: Topology | None) -> str:
    """Whether the programs fit, and what to change if not, in one line."""
    bad = next((p for p in programs if not p.fits), None)
    if bad is None and where is None:
        return "compiles for the devices of this machine"
    if bad is None:
        if not programs:
            return "nothing compiled"
        largest = max(programs, key=lambda p: p.needed or 0)
        free = (largest.usable or 0) - (largest.needed or 0)
        return (
            f"fits: {largest.program} needs {gib(largest.needed)} of {gib(largest.usable)} GiB a chip, "
            f"{gib(free)} are left for machine code and the next batches"
        )
    needs = f"{gib(bad.needed)} of {gib(bad.usable)} GiB a chip" if bad.needed else refusal(bad.refused)
    return f"does not fit: {bad.program} needs {needs}; {advice(bad, config, mesh)}"


def refusal(message: str | None) -> str:
    """The numbers in the compiler's message, or the message."""
    found = re.search(r"(\w+) \((\d[\d.]*)G\) exceeds available HBM \((\d[\d.]*)G\)", message or "")
    return f"{found[2]} GiB of {found[1]} alone, of {found[3]} a chip" if found else str(message)


def advice(bad: ProgramPlan, config: Any, mesh: dict[str, int]) -> str:
    """What makes a program smaller, what costs least first."""
    now = mesh_config(mesh)
    shards = (now.slices or 1) * now.data * now.fsdp
    change = []
    if now.data > 1:
        change.append(f"cut the parameters further (mesh.fsdp {now.fsdp * now.data}, mesh.data 1)")
    each = bad.rows // config.micro_batches // shards
    if bad.program == "train":
        if each > 1:
            change.append(f"run fewer rows at once (micro_batches {config.micro_batches * each})")
        if config.remat != "full":
            change.append("keep less for the backward pass (remat full)")
        if config.lora is None:
            change.append("train low-rank terms (lora)")
        if config.live_reference:
            change.append("store the reference (reference stored)")
        if config.lora is not None and not config.int8:
            change.append("keep the frozen base in int8 (lora.base int8)")
    elif each > 1:
        change.append(f"run fewer rows at once (batch_size {shards})")
    change.append(f"cut heads and feed-forward (mesh.tensor {2 * now.tensor})")
    change.append("take a larger slice")
    return "; or ".join(change)


# ---- as text ---------------------------------------------------------------------------------------


def gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"


def number(value: float) -> str:
    """Three digits with an SI prefix."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.3g} "


def program_text(plan: ProgramPlan) -> str:
    """A program's lines of the table."""
    lines = [f"{plan.program}: {plan.rows} rows, compiled in {plan.compile_seconds:.0f} s"]

    def row(name: str, text: str) -> None:
        lines.append(f"  {name:13} {text}")

    if plan.memory is None:
        row("memory", f"does not fit: {refusal(plan.refused)}")
        return "\n".join(lines)
    resident = plan.memory | ({"resident besides": plan.held} if plan.held else {})
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in resident.items())
    of = f" of {gib(plan.usable)}" if plan.usable else ""
    row("memory", f"{gib(plan.needed)}{of} GiB a chip ({kinds}){'' if plan.fits else ': does not fit'}")
    if plan.cache:
        row("cache", f"{gib(plan.cache)} GiB a chip at the longest response")
    useful = f", {plan.model_flops / plan.flops:.0%} of them the model's" if plan.flops else ""
    row("compute", f"{number(plan.flops)}FLOP a chip{useful}; {number(plan.hbm_bytes)}B of memory traffic")
    for each in plan.collectives:
        across = f", between {each['slices']} slices" if each["slices"] > 1 else ""
        row(
            each["kind"],
            f"{each['count']:.0f} in groups of {each['group']}{across}: "
            f"operands {number(each['operand'])}B, sent {number(each['sent'])}B a chip",
        )
    if plan.bound is not None:
        parts = ", ".join(f"{name} {seconds:.4g}" for name, seconds in plan.parts.items())
        row("bound", f"{plan.bound:.4g} s by {plan.limit} ({parts}); no measurement")
        row("at the bound", ", ".join(f"{value:,.4g} {name}" for name, value in plan.rates.items()))
    for note in plan.notes:
        row("note", note)
    return "\n".join(lines)


def policies_text(chosen: str, policies: dict[str, ProgramPlan]) -> str:
    """What a step takes under each rematerialisation."""
    lines = [f"remat auto: {chosen}"]
    for name, plan in policies.items():
        usable = f" of {gib(plan.usable)}" if plan.usable else ""
        takes = f"{gib(plan.needed)}{usable} GiB, {number(plan.flops)}FLOP a chip"
        takes += f", bound {plan.bound:.4g} s" if plan.bound else ""
        lines.append(f"  {name:13} {takes if plan.memory else 'does not fit: ' + refusal(plan.refused)}")
    return "\n".join(lines)


def heading(plan: Plan) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    tokens = " and ".join(str(n) for n in (plan.shape["prefix"], *(n for n, _ in plan.shape["others"])))
    shape = f"{tokens} + {plan.shape['response']} tokens, {plan.shape['tiles']} tiles"
    rented = f" ({plan.vendor_name}, {plan.chips} chips)" if plan.vendor_name else ""
    return f"{plan.model} on {plan.topology}{rented}, mesh {mesh}, rows of {shape}"
