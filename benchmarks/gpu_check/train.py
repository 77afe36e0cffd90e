"""LoRA DPO steps of LLaVA-1.6-7B's shape at full length: time, MFU, memory."""

from __future__ import annotations

import time
from pathlib import Path

import jax
import numpy as np

from gpu_check import model as shapes
from gpu_check.lines import Figures, Lines
from gpu_check.model import Held, Sizes
from mllm_align.config import Remat
from mllm_align.training.flops import group_flops, train_flops
from mllm_align.training.programs import Program, train_program


def run(lines: Lines, work: Path, tiny: bool) -> None:
    chosen, held = shapes.sizes(tiny), []
    if lines("weights", lambda: shapes.weights(held, chosen)):
        for pairs, remat in chosen.steps:
            size = f"{pairs} pairs of {chosen.prefix} + {chosen.response} tokens"
            item = f"LoRA DPO step, {size}, remat {remat}"
            lines(item, lambda n=pairs, r=remat: timed(held[0], n, r), needs=0 if tiny else 30)


class Step:
    """A compiled step with its batch and its state, which every call moves on."""

    def __init__(self, held: Held, pairs: int, remat: Remat):
        config = shapes.dpo(held.sizes, pairs, remat)
        self.program: Program = train_program(config, held.model, held.mesh, steps=1000)
        self.state = shapes.begun(held, config, self.program)
        self.base = {name: held.params[name] for name in self.program.base}
        self.batch = shapes.batch(held, pairs)
        began = time.perf_counter()
        lowered = self.program.step.lower(self.state, self.base, self.batch)
        self.trace_seconds = time.perf_counter() - began
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began - self.trace_seconds
        self.cudnn_calls = lowered.as_text().count("@__cudnn$")
        self.loss = float("nan")

    def __call__(self) -> None:
        self.state, metrics, _ = self.compiled(self.state, self.base, self.batch)
        self.loss = float(np.divide(*jax.device_get(metrics["loss"])))  # waits for the step


def timed(held: Held, pairs: int, remat: Remat) -> Figures:
    before, s = shapes.memory(), held.sizes
    step = Step(held, pairs, remat)
    taken = shapes.seconds(step, s.times)
    if not np.isfinite(step.loss):
        raise RuntimeError(f"the loss is {step.loss}")
    if held.mesh.devices.flat[0].platform == "gpu" and not step.cudnn_calls:
        raise RuntimeError("the step calls no kernel of cuDNN")
    median = shapes.spread(taken)["median"]
    flops, peak = step_flops(held, pairs), shapes.peak()
    tokens = pairs * (s.prefix + 2 * s.response)
    return {
        "pairs": pairs,
        "remat": remat,
        "step_s": shapes.spread(taken),
        "pairs_per_s": pairs / median,
        "tokens_per_s": tokens / median,
        "flops_per_s": flops / median,
        "mfu": None if peak is None else flops / median / peak,
        "trace_s": step.trace_seconds,
        "compile_s": step.compile_seconds,
        "cudnn_calls": step.cudnn_calls,
        "planned_bytes": shapes.planned_bytes(step.compiled),
        **shapes.memory(before),
        "loss": step.loss,
    }


def step_flops(held: Held, pairs: int) -> float:
    """What the mathematics of a step needs: no recomputation, no padding."""
    s: Sizes = held.sizes
    tiles, _ = shapes.picture(held.model)
    forward = group_flops(held.model, tiles, s.prefix, [s.response] * 2)
    return pairs * train_flops(forward, lora=True, tower=False, reference=True)
