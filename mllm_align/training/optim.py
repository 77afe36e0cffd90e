"""What is trained, and how fast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mllm_align.align.reward import Reward
from mllm_align.config import Config, OptimConfig
from mllm_align.models.bundle import Bundle, abstract_params, base_shardings, lora_shardings
from mllm_align.models.config import ModelConfig
from mllm_align.models.huggingface import load_params
from mllm_align.models.lora import init_lora
from mllm_align.models.policy import SCORE, VALUE
from mllm_align.sharding import replicated, tree_lookup

Tree = dict[str, Any]


def trained_parts(config: Config, model: ModelConfig) -> tuple[str, ...]:
    """Top-level parts of the parameters that a run replaces (LoRA terms are beside these)."""
    parts = ("projector",) if config.lora else tuple(p for p in model.parts if p not in config.freeze)
    if config.optim.projector_learning_rate == 0:
        parts = tuple(p for p in parts if p != "projector")
    return parts


def abstract_trained(config: Config, model: ModelConfig, mesh: Mesh) -> Tree:
    """The tree that is trained, float32, as shapes with shardings."""
    whole, places = abstract_params(model), base_shardings(model, mesh)

    def wide(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.value.shape, jnp.float32, sharding=where)

    params = {
        part: jax.tree.map(wide, whole[part], places[part], is_leaf=lambda x: hasattr(x, "names"))
        for part in trained_parts(config, model)
    }
    trained: Tree = {"params": params} if params else {}
    if config.lora:
        lora = jax.eval_shape(lambda: _lora(config, model))
        trained["lora"] = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            lora,
            lora_shardings(model, lora, mesh),
        )
    head = jax.ShapeDtypeStruct((model.decoder.hidden,), jnp.float32, sharding=replicated(mesh))
    if "score" in config.objective.needs:
        trained[SCORE] = {"kernel": head}
    if "values" in config.objective.needs:
        trained[VALUE] = abstract_trained(value_config(config), model, mesh)
    return trained


def value_config(config: Config) -> Config:
    """Of a run's value model, which is a reward model with a projector of its own."""
    optim = replace(config.optim, projector_learning_rate=None)
    return replace(config, objective=Reward(), online=None, optim=optim)


def _lora(config: Config, model: ModelConfig) -> Tree:
    assert config.lora is not None
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return init_lora(model.decoder, config.lora.rank, config.lora.targets, key)


def init_trained(bundle: Bundle, config: Config) -> Tree:
    """The tree that is trained, float32, at its starting point: policy = reference.

    Replaced parts are read from the folder again, so that 16-bit computation does not round them.
    """
    return _started(abstract_trained(config, bundle.config, bundle.mesh), bundle, config)


def _started(trained: Tree, bundle: Bundle, config: Config) -> Tree:
    """The arrays of an abstract tree: of the policy, or of a value model, which starts as it does."""
    trained = dict(trained)
    parts = trained.get("params")
    if parts is not None:
        where = tree_lookup(jax.tree.map(lambda x: x.sharding, parts))
        trained["params"] = load_params(
            bundle.folder, jnp.float32, where, only=lambda path: path[0] in parts
        )
    if config.lora:  # each device makes its own part
        places = jax.tree.map(lambda x: x.sharding, trained["lora"])
        trained["lora"] = jax.jit(lambda: _lora(config, bundle.config), out_shardings=places)()
    if (head := trained.get(SCORE)) is not None:  # every response scores 0
        zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in head.items()}
        trained[SCORE] = jax.device_put(zeros, jax.tree.map(lambda x: x.sharding, head))
    if (critic := trained.get(VALUE)) is not None:
        trained[VALUE] = _started(critic, bundle, config)
    return trained


def schedule(optim: OptimConfig, peak: float, steps: int, warmup: int | None = None) -> optax.Schedule:
    """Rate of step 0, 1, ...: linear warm-up to the peak, then constant, linear or cosine to 0.

    warmup: steps of the warm-up, where they are not the config's share of all steps.
    """
    warmup = round(optim.warmup * steps) if warmup is None else warmup
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[optim.schedule]
    if not warmup:
        return after
    # the first step already moves: it takes the first of `warmup` equal stairs, not rate 0
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    optim: OptimConfig, steps: int, warmup: int | None = None
) -> optax.GradientTransformation:
    """AdamW under one global clip; the projector has a learning rate of its own."""
    main = schedule(optim, optim.learning_rate, steps, warmup)
    own = optim.projector_learning_rate
    projector = main if own is None else schedule(optim, own, steps, warmup)

    def labels(trained: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "projector" if any(key.key == "projector" for key in path) else "main", trained
        )

    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay),
        optax.partition(
            {
                "main": optax.scale_by_learning_rate(main),
                "projector": optax.scale_by_learning_rate(projector),
            },
            labels,
        ),
    )
