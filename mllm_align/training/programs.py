"""The compiled steps of a run, made from shapes alone: nothing is allocated.

The loop runs them on this machine's devices; `mllm-align plan` compiles the same ones for a machine that
is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mllm_align.align.contract import Objective, Views
from mllm_align.batch import PromptGroup, Shape, blank
from mllm_align.config import Config
from mllm_align.errors import InputError
from mllm_align.models.bundle import abstract_params, base_shardings, check_mesh, compute_dtype, make_model
from mllm_align.models.config import ModelConfig
from mllm_align.sharding import batch_sharding, batch_shards, replicated
from mllm_align.training.optim import abstract_trained, make_optimizer, trained_parts
from mllm_align.training.step import TrainState, make_evaluation, make_step


@dataclass(frozen=True)
class Program:
    """step(state, base, batch) -> (state, metrics, health), evaluate(trained, base, batch, objective's
    state) -> (metrics, health): jitted, shardings pinned, the step's state donated.

    state, base: what they take, as shapes with shardings.
    """

    step: Any
    evaluate: Any
    state: TrainState
    base: Any
    optimizer: optax.GradientTransformation


def struct(shape: Any, dtype: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)


def abstract_base(config: ModelConfig, mesh: Mesh, dtype: Any) -> Any:
    """The checkpoint's parameters in the dtype of the computation, or in int8."""
    places = base_shardings(config, mesh)
    boxed, int8 = abstract_params(config), jnp.dtype(jnp.int8)
    return jax.tree.map(
        lambda leaf, where: struct(leaf.value.shape, int8 if leaf.value.dtype == int8 else dtype, where),
        boxed,
        places,
        is_leaf=lambda x: hasattr(x, "names"),
    )


def abstract_state(
    trained: Any,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    whole: jax.sharding.Sharding,
) -> TrainState:
    """Optimizer moments live where the parameters live that they belong to."""
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, parameter: struct(leaf.shape, leaf.dtype, parameter.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda leaf: struct(leaf.shape, leaf.dtype, whole),
    )
    own = jax.tree.map(lambda x: struct(x.shape, x.dtype, whole), jax.eval_shape(objective.init_state))
    return TrainState(struct((), jnp.int32, whole), trained, moments, own)  # type: ignore[arg-type]


def train_program(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    steps: int,
    warmup: int | None = None,
    sources: Sequence[str] = (),
) -> Program:
    """The programs of a run of `steps` steps, of them `warmup` with rising rates (default: the config's
    share). sources: names of the data sets that are mixed."""
    dtype = compute_dtype(config.dtype, mesh)
    trained = abstract_trained(config, model, mesh)
    optimizer = make_optimizer(config.optim, steps, warmup)
    state = abstract_state(trained, optimizer, config.objective, replicated(mesh))
    base = abstract_base(model, mesh, dtype)
    if not config.live_reference:
        # no reference is run: what is trained needs no frozen copy
        parts = trained_parts(config, model)
        base = {name: part for name, part in base.items() if name not in parts}
    policy = make_model(model, config.remat)
    common = (1.0 if config.lora is None else config.lora.scale, dtype, mesh)
    rows, whole = batch_sharding(mesh), replicated(mesh)
    places, base_places = (jax.tree.map(lambda x: x.sharding, t) for t in (state, base))
    step = jax.jit(
        make_step(policy, config.objective, optimizer, *common, sources),
        in_shardings=(places, base_places, rows),
        out_shardings=(places, whole, whole),
        donate_argnums=0,
    )
    evaluate = jax.jit(
        make_evaluation(policy, config.objective.held_out, *common),
        in_shardings=(places.trained, base_places, rows, whole),
        out_shardings=whole,
    )
    return Program(step, evaluate, state, base, optimizer)


def check_fits(config: Config, model: ModelConfig, mesh: Mesh) -> list[str]:
    """Names what every device of the tensor axis keeps whole. Raises InputError where mesh, model and batch
    do not go together."""
    rows, shards = config.rows_per_micro, batch_shards(mesh)
    if rows % shards:
        raise InputError(
            f"batch_size / micro_batches is {rows}; it must be a multiple of {shards}, the devices that "
            "share a batch (slices x mesh.data x mesh.fsdp)"
        )
    return check_mesh(model, mesh)


def batch_structs(
    config: Config, model: ModelConfig, mesh: Mesh, shape: Shape, views: Views
) -> PromptGroup:
    """A batch of the run, padded to `shape`, as the step takes it: [micro-batches, rows, ...]."""
    v, where = model.vision, batch_sharding(mesh)

    def make(dims: tuple[int, ...], dtype: Any) -> Any:
        return struct((config.micro_batches, config.rows_per_micro, *dims), dtype, where)

    axes = model.decoder.num_rope_axes
    tile = v.patches, v.patch_width
    stored = "reference" in config.objective.needs and not config.live_reference
    features = (
        (v.tokens, v.features, compute_dtype(config.dtype, mesh)) if config.features == "stored" else None
    )
    changed = "changes" in config.objective.needs
    given = stored, changed, config.objective.fields, features, len(config.objective.references)
    return blank(make, shape, tile, views, axes, model.taps, *given)
