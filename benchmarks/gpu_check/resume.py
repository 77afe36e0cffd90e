"""A run of N steps against the same run resumed after half: the trained parameters are bit-identical.

Both runs use separate processes, like a requeued job, and share no compiled programs; XLA flags make the
operations deterministic.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_check.lines import Figures, Lines, check

STEPS, PAIRS = 6, 16
LEGS = ("whole", "resumed")
Trained = dict[str, np.ndarray]


def run(lines: Lines, work: Path, tiny: bool) -> None:
    work = work / "resume"
    dtypes = ["float32"] if tiny else ["bfloat16", "float32"]

    def legs() -> Figures:
        for name in LEGS:
            leg(name, work, dtypes, lines.left())
        return {"steps": STEPS, "resumed_at": STEPS // 2, "xla_flags": os.environ.get("XLA_FLAGS", "")}

    if lines("runs", legs):
        for dtype in dtypes:
            lines(f"trained parameters, {dtype}", lambda d=dtype: compared(work, d))


def leg(name: str, work: Path, dtypes: list[str], seconds: float) -> None:
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "gpu_check.resume", name, str(work), *dtypes]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        missing = last.partition("ModuleNotFoundError: No module named ")[2].strip("'\"")
        if missing:
            raise ModuleNotFoundError(last, name=missing)
        raise RuntimeError(f"{last}\n{done.stderr[-3000:]}")


def compared(work: Path, dtype: str) -> Figures:
    whole, resumed = (read(work / f"{name}-{dtype}.npz") for name in LEGS)
    if whole.keys() != resumed.keys():
        raise RuntimeError("the two runs trained other parameters")
    start = read(work / f"start-{dtype}.npz")
    moved = sum(int((whole[name] != start[name]).sum()) for name in whole)
    if not moved:
        raise RuntimeError("nothing was trained")
    other = sum(int((_bits(whole[name]) != _bits(resumed[name])).sum()) for name in whole)
    return {
        "parameters": sum(x.size for x in whole.values()),
        "moved": moved,
        "largest_difference": max(float(np.abs(whole[n] - resumed[n]).max()) for n in whole),
        "checks": {"parameters_that_differ": check(other, 0)},
    }


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def read(file: Path) -> Trained:
    with np.load(file) as found:
        return dict(found)


# ---- in a process of its own -------------------------------------------------------------------------


def train_leg(name: str, work: Path, dtypes: list[str]) -> None:
    from mllm_align.config import Config, DataConfig, LoraConfig, MeshConfig, OptimConfig
    from mllm_align.testbed.demo import make_model, make_pairs
    from mllm_align.training.callbacks import Callback
    from mllm_align.training.loop import train

    class Taken(Callback):
        def __init__(self):
            self.steps: list[int] = []

        def on_step(self, metrics: dict[str, Any]) -> None:
            self.steps.append(metrics["step"])

    if name == "whole":
        make_model(work / "model")
        make_pairs(work / "pairs", PAIRS, held_out=1)
    for dtype in dtypes:
        config = Config(
            lora=LoraConfig(rank=4, alpha=8.0),
            optim=OptimConfig(learning_rate=1e-3, schedule="constant", warmup=0.0),
            data=DataConfig(shapes=1),
            mesh=MeshConfig(),
            batch_size=4,
            steps=STEPS,
            dtype=dtype,  # type: ignore[arg-type]
            save_every=STEPS // 2,
            keep=2,
            remat="none",  # compiles fastest
            log_every=1,
        )
        out = work / f"{name}-{dtype}"
        if name == "resumed":  # as the whole run was at its half
            shutil.copytree(work / f"whole-{dtype}", out)
            shutil.rmtree(out / "checkpoints" / str(STEPS))
        taken = Taken()
        done = train(
            config,
            work / "model",
            work / "pairs" / "pairs.jsonl",
            out,
            callbacks=[taken],
        )
        first = 1 + (STEPS // 2 if name == "resumed" else 0)
        if taken.steps != [*range(first, STEPS + 1)]:
            raise RuntimeError(f"the {name} run took steps {taken.steps}")
        write(work / f"{name}-{dtype}.npz", done.trained)
        if name == "whole":
            write(work / f"start-{dtype}.npz", _start(done, replace(config, dtype=dtype)))  # type: ignore[arg-type]


def _start(bundle: Any, config: Any) -> Any:
    from mllm_align.training.optim import init_trained

    return init_trained(bundle, config)


def write(file: Path, trained: Any) -> None:
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(trained)[0]
    np.savez(file, **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


if __name__ == "__main__":
    train_leg(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
