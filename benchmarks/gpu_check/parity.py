"""Scores and one LoRA DPO step of the demo's model: this device against the CPU, in one process.

Bounds. In float32 the two devices sum the same products in different orders: about 1e-6 of a log-prob, more
in gradients. The bounds are one or two orders of magnitude above that, and well below the error of 10-bit
products (TF32), which they are to detect. In bfloat16 (8 bits), two orders of summation differ by about as
much as each differs from float32. The CPU's own bfloat16 error against float32 is therefore measured too,
and the device's may be twice that (three times for the largest of many).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpu_check.differ import largest, relative, root_mean_square
from gpu_check.lines import Figures, Lines, check
from mllm_align.batch import PromptGroup
from mllm_align.config import Config, DataConfig, Dtype, LoraConfig, MeshConfig, OptimConfig
from mllm_align.data.batches import Batches
from mllm_align.models.bundle import load
from mllm_align.prepare import prepare
from mllm_align.scoring import logps_program
from mllm_align.sharding import batch_sharding, make_mesh
from mllm_align.testbed.demo import make_model, make_pairs
from mllm_align.training.optim import init_trained
from mllm_align.training.programs import train_program
from mllm_align.training.step import TrainState

NATS, RELATIVE = 1e-4, 1e-3  # float32: log-probs and loss; gradients
LOSS_16 = 0.02  # nats: beta 0.1 times a margin that is 0.2 nats off
PAIRS = 8

CONFIG = Config(
    lora=LoraConfig(rank=4, alpha=8.0),
    # Adam's first step is the sign of the gradient, which rounding decides where there is next to none.
    # With an eps of 1 the step is nearly the gradient itself; with a rate of 1 float32 keeps its digits.
    optim=OptimConfig(learning_rate=1.0, schedule="constant", warmup=0.0, eps=1.0),
    data=DataConfig(shuffle=False, shapes=1),
    batch_size=PAIRS,
)


class Computed(NamedTuple):
    """logps: nats per token, 0 at padding. update: of every trained parameter, by one step."""

    logps: np.ndarray
    mask: np.ndarray
    loss: float
    grad_norm: float
    update: Any


def run(lines: Lines, work: Path, tiny: bool) -> None:
    model, pairs = work / "parity" / "model", work / "parity" / "pairs"

    @cache  # where there is a CPU alone, both are one
    def on(device: Any, dtype: Dtype) -> Computed:
        if not model.exists():
            make_model(model)
            make_pairs(pairs, PAIRS, held_out=1)
        with jax.default_device(device):
            return compute(model, pairs / "pairs.jsonl", device, dtype)

    def computed(where: str, dtype: Dtype) -> Computed:
        return on(jax.devices()[0] if where == "device" else jax.devices("cpu")[0], dtype)

    lines("scores and step, float32", lambda: float32(computed))
    lines("scores and step, bfloat16", lambda: bfloat16(computed))


def float32(computed: Callable[[str, Dtype], Computed]) -> Figures:
    found, expected = computed("device", "float32"), computed("cpu", "float32")
    return {
        "device": jax.devices()[0].device_kind,
        "tokens": int(expected.mask.sum()),
        **figures(found, expected),
        "checks": {
            "logp_nats": check(largest(found.logps, expected.logps), NATS),
            "sequence_logp_nats": check(largest(found.logps.sum(-1), expected.logps.sum(-1)), 10 * NATS),
            "loss_nats": check(abs(found.loss - expected.loss), NATS),
            "grad_norm_relative": check(abs(found.grad_norm / expected.grad_norm - 1), RELATIVE),
            "update_relative": check(relative(found.update, expected.update), RELATIVE),
        },
    }


def bfloat16(computed: Callable[[str, Dtype], Computed]) -> Figures:
    found, cpu, exact = (
        computed(where, dtype)
        for where, dtype in (("device", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32"))
    )

    def rounding(distance: Callable, part: Callable[[Computed], Any], times: float) -> Figures:
        return check(distance(part(found), part(exact)), times * distance(part(cpu), part(exact)))

    update = rounding(relative, lambda x: x.update, 2)
    return {
        "device": jax.devices()[0].device_kind,
        **figures(found, cpu),
        "checks": {
            "logp_rms_nats": rounding(root_mean_square, lambda x: x.logps[x.mask], 2),
            "logp_nats": rounding(largest, lambda x: x.logps, 3),
            "loss_nats": check(abs(found.loss - exact.loss), LOSS_16),
            # norms differ by no more than the norm of the difference
            "grad_norm_relative": check(abs(found.grad_norm / exact.grad_norm - 1), update["bound"]),
            "update_relative": update,
        },
    }


def figures(found: Computed, expected: Computed) -> Figures:
    """Differences, larger ones first seen here, beside the checks."""
    return {
        "loss": [found.loss, expected.loss],
        "grad_norm": [found.grad_norm, expected.grad_norm],
        "logp_relative": relative(found.logps, expected.logps),
        "update_largest": largest(found.update, expected.update),
    }


def compute(model: Path, pairs: Path, device: Any, dtype: Dtype) -> Computed:
    mesh, config = make_mesh(MeshConfig(), [device]), replace(CONFIG, dtype=dtype)
    bundle = replace(load(model, dtype, mesh), lora=config.lora)
    encoder, records, _ = prepare(bundle, pairs, config.data, 2)
    batches = Batches(records, encoder, size=PAIRS, shapes=1, multiple=config.data.multiple)
    host = batches(0).group
    batch: PromptGroup = jax.device_put(host, batch_sharding(mesh))

    one = jax.tree.map(lambda x: jax.device_put(x[0], batch_sharding(mesh, micro=False)), host)
    logps = logps_program(bundle.config, mesh, 1.0, bundle.dtype)(bundle.params, {}, one)

    program = train_program(config, bundle.config, mesh, steps=1)
    begun = started(init_trained(bundle, config))
    trained = jax.device_put(begun, jax.tree.map(lambda x: x.sharding, program.state.trained))
    state = TrainState(jnp.zeros((), jnp.int32), trained, program.optimizer.init(trained))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.state))
    base = {name: bundle.params[name] for name in program.base}
    state, metrics, _ = program.step(state, base, batch)
    update = jax.tree.map(lambda new, old: np.asarray(new) - old, jax.device_get(state.trained), begun)
    loss, norm = (float(np.divide(*jax.device_get(metrics[name]))) for name in ("loss", "grad_norm"))
    return Computed(np.asarray(logps, np.float32), host.responses.mask[0], loss, norm, update)


def started(trained: Any) -> Any:
    """On the host, with `b` of the low-rank terms off 0: at 0 the loss is log 2 and `a` has no gradient."""
    rng = np.random.default_rng(0)

    def off(path: Any, leaf: Any) -> np.ndarray:
        value = np.asarray(leaf)
        return rng.normal(0, 0.05, value.shape).astype(value.dtype) if path[-1].key == "b" else value

    return jax.tree_util.tree_map_with_path(off, jax.device_get(trained))
