"""The whole path on a model and pairs made on the spot: train, evaluate, export, score the export."""

from __future__ import annotations

from pathlib import Path

import jax

from mllm_align.align.objectives import DPO
from mllm_align.config import Config, LoraConfig, OptimConfig
from mllm_align.data.demo import make_model, make_pairs
from mllm_align.errors import refusal
from mllm_align.models.bundle import load
from mllm_align.training.loop import train
from mllm_align.training.run import export_run
from mllm_align.training.score import score


def config(steps: int) -> Config:
    devices = jax.device_count()
    return Config(
        objective=DPO(beta=0.1),
        lora=LoraConfig(rank=8, alpha=16.0),
        optim=OptimConfig(learning_rate=2e-3, projector_learning_rate=1e-3, schedule="constant"),
        batch_size=-(-8 // devices) * devices,
        steps=steps,
        remat="none",
    )


def run(out: Path, steps: int) -> dict[str, float]:
    """Make `out`/model, data, run and aligned; print and return what came of it.

    Raises InputError if `out` exists and is not empty.
    """
    settings = config(steps)  # refuses before anything is made
    if out.is_dir() and any(out.iterdir()):
        raise refusal(str(out), "the folder is not empty", "name a new one, or remove it first")
    make_model(out / "model")
    pairs = make_pairs(out / "data", count=1024, held_out=128)
    held_out = out / "data" / "held_out.jsonl"
    train(settings, out / "model", pairs, out / "run", held_out)
    report = export_run(out / "run", out / "aligned")
    margins = {}
    for name in ("model", "aligned"):
        lines = score(load(out / name), held_out)
        margins[name] = sum(s["chosen_logp"] - s["rejected_logp"] for s in lines) / len(lines)
    print(f"exported step {report['step']} to {out / 'aligned'}: {report['merged']} tensors merged")
    print(
        "held-out pairs, mean log-prob of chosen minus rejected, nats: "
        f"{margins['model']:.2f} before, {margins['aligned']:.2f} after (scored from the exported folder)"
    )
    return margins
