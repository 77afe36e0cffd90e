"""The programs of a config, lowered from shapes only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mllm_align.align.contract import Views
from mllm_align.annotate.reward import RewardModel
from mllm_align.batch import Prefix, Shape, blank_prefix, with_responses
from mllm_align.config import (
    BDHSConfig,
    BDHSMethod,
    Config,
    MeshConfig,
    Online,
    OnlineRewards,
    SamplingConfig,
)
from mllm_align.data.layout import counts
from mllm_align.generation import slots
from mllm_align.generation.decode import part_of, programs
from mllm_align.generation.loop import Forks, begin
from mllm_align.models.bundle import check_mesh, compute_dtype, make_model
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.registry import family_of
from mllm_align.models.policy import policy_variables
from mllm_align.scoring import logps_program, rewards_program
from mllm_align.sharding import batch_sharding, batch_shards, remade, replicated
from mllm_align.sizes import bucket, round_up
from mllm_align.training.fitting import bytes_of
from mllm_align.training.online.rewarded import forward_program
from mllm_align.training.optim import abstract_trained, value_config
from mllm_align.training.programs import abstract_base, batch_structs, check_fits, struct, train_program

TEXT = 128
"""Tokens of text besides the image in the planned prompt."""


@dataclass(frozen=True)
class Sizes:
    """The planned sizes: padded batch shape, maximum tokens of a generated response, and which responses
    continue which prefix in training."""

    shape: Shape
    tokens: int
    views: Views

    @property
    def responses(self) -> int:
        """Per prompt."""
        return len(self.views[0])


def sizes(
    config: Config | BDHSConfig, model: ModelConfig, prefix: int | None = None, response: int | None = None
) -> Sizes:
    """Sizes for one image of the largest size with TEXT tokens of text, padded according to the config.

    prefix: length of the prompt in tokens, instead. response: tokens of each response, by default 256.
    """
    layout = family_of(model).layout(model)
    found = [counts(layout, *image, 1) for image in layout.largest]
    tiles, _, longest = (max(count) for count in zip(*found, strict=True))
    multiple = config.data.multiple
    wanted = longest + TEXT if prefix is None else prefix
    wanted, answer = (round_up(n, multiple) for n in (wanted, response or 256))
    views = config.objective.views if isinstance(config, Config) else ((),)
    shape = Shape(wanted, answer, tiles, ((wanted, tiles),) * (len(views) - 1))
    return Sizes(shape, _sampling(config).max_tokens, views)


def _sampling_mesh(config: Config | BDHSConfig, mesh: Mesh, program: str) -> Mesh:
    """Where a program of generation runs."""
    own = _rollout_mesh(config)
    return remade(mesh, own) if own is not None and program in ("features", "prefill", "decode") else mesh


def _rollout_mesh(config: Config | BDHSConfig) -> MeshConfig | None:
    """That of an online run's rollouts, if they have their own."""
    return config.online.mesh if isinstance(config, Config) and config.online is not None else None


def _source(config: Config | BDHSConfig) -> Online | BDHSConfig | None:
    """What makes responses."""
    return config.online if isinstance(config, Config) else config


def _sampling(config: Config | BDHSConfig) -> SamplingConfig:
    source = _source(config)
    return SamplingConfig() if source is None else source.sampling


def _generates(config: Config | BDHSConfig) -> bool:
    """Whether the config's own work generates responses."""
    return not isinstance(config, Config) or (config.online is not None and config.online.generates)


def _in_parts(config: Config | BDHSConfig) -> bool:
    """Whether rows begin where others have ended (`Generator`), not all at once (rollouts)."""
    return isinstance(_source(config), BDHSMethod) or not _generates(config)


def names(config: Config | BDHSConfig) -> tuple[str, ...]:
    """The programs that a config runs: of generation only where it generates."""
    generation = ("features", "prefill", "decode") if _generates(config) else ()
    if not generation and getattr(config, "features", "live") == "stored":
        generation = ("features",)
    if isinstance(config, BDHSConfig):
        return generation
    scoring = ("score",) if config.objective.fields else ()
    if _reward_model(config) is not None:
        scoring += ("reward",)
    stored = config.stored_reference or config.objective.references
    return ("train", *(("reference",) if stored else ()), *generation, *scoring)


def _reward_model(config: Config | BDHSConfig) -> RewardModel | None:
    """The annotator, where it is a reward model on the devices."""
    annotator = getattr(config.online, "annotator", None) if isinstance(config, Config) else None
    return annotator if isinstance(annotator, RewardModel) else None


def check(config: Config | BDHSConfig, model: ModelConfig, mesh: Mesh) -> list[str]:
    """What stays whole on every device. Raises InputError for a config that this mesh can't run."""
    if isinstance(config, Config):
        return check_fits(config, model, mesh)
    return check_mesh(model, mesh)


def rows(config: Config | BDHSConfig, mesh: Mesh, program: str) -> int:
    """Prompts per run of a program."""
    if program in ("train", "score"):
        return config.batch_size
    if program == "reward":
        found = _reward_model(config)
        return round_up(found.batch_size if found else 8, batch_shards(mesh))
    size = config.rows_per_micro if program == "reference" or _generates(config) else 8
    shards = batch_shards(_sampling_mesh(config, mesh, program))
    size = round_up(size, shards)
    return part_of(size, shards) if program == "prefill" and _in_parts(config) else size


def lower(
    program: str, config: Config | BDHSConfig, model: ModelConfig, mesh: Mesh, planned: Sizes
) -> jax.stages.Lowered:
    """Lower a program. train: a step. reference: log-probs of a batch. features, prefill, decode: of
    generation. score: log-probs and values of a rollout. reward: a reward model's scores of responses."""
    if program == "train":
        assert isinstance(config, Config)
        made = train_program(config, model, mesh, steps=1000)
        batch = batch_structs(config, model, mesh, planned.shape, planned.views)
        return made.step.lower(made.state, made.base, batch)
    dtype, mesh = compute_dtype(config.dtype, mesh), _sampling_mesh(config, mesh, program)
    base, count = abstract_base(model, mesh, dtype), rows(config, mesh, program)
    if program == "reference":
        assert isinstance(config, Config)
        group = _group(model, mesh, planned, count, config)
        return logps_program(model, mesh, 1.0, dtype).lower(base, {}, group)
    if program in ("score", "reward"):
        assert isinstance(config, Config)
        scale = 1.0 if config.lora is None else config.lora.scale
        if program == "reward":
            trained = abstract_trained(value_config(config), model, mesh)
            group = _group(model, mesh, planned, count)
            return rewards_program(model, mesh, scale, dtype).lower(base, trained, group)
        batch = batch_structs(config, model, mesh, planned.shape, planned.views)
        bare = with_responses(batch, reference=None, **dict.fromkeys(config.objective.fields))
        trained = abstract_trained(config, model, mesh)
        return forward_program(model, mesh, scale, dtype).lower(base, trained, bare)
    rule = replace(_sampling(config), max_tokens=1)  # forks carry their own limits
    made = programs(model, mesh, 1.0, dtype, rule)
    if program == "features":
        return made.features.lower(base, {}, _group(model, mesh, planned, count).prefix.pixels)
    if program == "prefill":
        found, text = _features(model, mesh, planned, count, dtype), _text(model, mesh, planned, count)
        source = _source(config)
        holes = isinstance(source, BDHSMethod) and source.distortion == "attention"
        return made.prefill.lower(base, {}, found, text, holes)
    cache, state = _under_way(config, model, mesh, planned, count, dtype)
    stops = struct((model.decoder.vocab,), jnp.bool_, replicated(mesh))
    enough = struct((), np.int32, replicated(mesh))
    return made.decode.lower(base, {}, cache, state, stops, enough)


def _group(model: ModelConfig, mesh: Mesh, planned: Sizes, count: int, config: Config | None = None) -> Any:
    """A batch of the first view, without an axis of micro-batches."""
    config = config or Config()
    whole = replace(config, batch_size=count, micro_batches=1, reference="live", features="live")
    shape = replace(planned.shape, others=())
    group = batch_structs(whole, model, mesh, shape, planned.views[:1])
    where = batch_sharding(mesh, micro=False)
    return jax.tree.map(lambda x: struct(x.shape[1:], x.dtype, where), group)


def _text(model: ModelConfig, mesh: Mesh, planned: Sizes, count: int) -> Prefix:
    """Prefixes without pixels, as prefill takes them."""
    where, length = batch_sharding(mesh, micro=False), bucket(planned.shape.prefix, 32)
    axes = model.decoder.num_rope_axes
    return blank_prefix(lambda dims, dtype: struct((count, *dims), dtype, where), length, axes, model.taps)


def _features(model: ModelConfig, mesh: Mesh, planned: Sizes, count: int, dtype: Any) -> Any:
    found = bucket(planned.shape.tiles * model.vision.tokens, 1)
    return struct((count, found, model.vision.features), dtype, batch_sharding(mesh, micro=False))


def _cache(model: ModelConfig, mesh: Mesh, planned: Sizes, count: int, dtype: Any) -> Any:
    features, text = _features(model, mesh, planned, count, dtype), _text(model, mesh, planned, count)
    whole = make_model(model)

    def fill(params: Any, features: Any, prefix: Any) -> Any:
        return whole.apply(policy_variables(params, {}, 1.0, dtype), features, prefix, method="prefill")

    kept = jax.eval_shape(fill, abstract_base(model, mesh, dtype), features, text)
    places, _ = slots.shardings(model, mesh)
    return jax.tree.map(lambda x, where: struct(x.shape, x.dtype, where), kept, places)


def _under_way(
    config: Config | BDHSConfig, model: ModelConfig, mesh: Mesh, planned: Sizes, count: int, dtype: Any
) -> tuple[Any, Any]:
    """Caches and state of the rows that are decoded."""
    cache, forks = _cache(model, mesh, planned, count, dtype), _forks(mesh, planned, count, samples(config))
    _, places = slots.shardings(model, mesh)
    state = jax.tree.map(
        lambda x, where: struct(x.shape, x.dtype, where), jax.eval_shape(begin, cache, forks), places
    )
    return cache, state


def under_way_bytes(config: Config | BDHSConfig, model: ModelConfig, mesh: Mesh, planned: Sizes) -> int:
    """Bytes on one chip of the whole batch, to which a prefill adds a part; 0 where all begin at once."""
    if not _in_parts(config):
        return 0
    dtype, count = compute_dtype(config.dtype, mesh), rows(config, mesh, "decode")
    return bytes_of(
        _under_way(config, model, _sampling_mesh(config, mesh, "decode"), planned, count, dtype)
    )


def cache_bytes(config: Config | BDHSConfig, model: ModelConfig, mesh: Mesh, planned: Sizes) -> int:
    """Keys and values of prefixes and responses on one chip, with every response at its longest."""
    dtype, count = compute_dtype(config.dtype, mesh), rows(config, mesh, "decode")
    mesh = _sampling_mesh(config, mesh, "decode")
    kept = _cache(model, mesh, planned, count, dtype)
    prefix = bytes_of((kept.layers, kept.last))
    length = bucket(planned.shape.prefix, 32)
    return prefix * (length + samples(config) * bucket(planned.tokens)) // length


def resident_bytes(program: str, config: Config | BDHSConfig, model: ModelConfig, mesh: Mesh) -> int:
    """Bytes on one chip that a run holds beside what a program itself takes: the base while a further
    reference is run; online what is trained and its moments while it generates, and the other copy of the
    base where rollouts have their own mesh."""
    if program == "reference" and isinstance(config, Config) and config.objective.references:
        return bytes_of(abstract_base(model, mesh, compute_dtype(config.dtype, mesh)))
    if not isinstance(config, Config) or config.online is None:
        return 0
    dtype, own = compute_dtype(config.dtype, mesh), config.online.mesh
    if program == "train":
        other = bytes_of(abstract_base(model, remade(mesh, own), dtype)) if own is not None else 0
        if not config.online.rollout:
            return other
        # the step takes no frozen copy of what is trained; the rollout's reference does
        whole, made = abstract_base(model, mesh, dtype), train_program(config, model, mesh, steps=1000)
        return other + bytes_of(whole) - bytes_of(made.base)
    made = train_program(config, model, mesh, steps=1000)
    return bytes_of(made.state) + (bytes_of(made.base) if own is not None else 0)


def samples(config: Config | BDHSConfig) -> int:
    """Continuations of one prompt."""
    if not isinstance(config, Config) or config.online is None:
        return 1
    online = config.online
    return config.objective.responses if isinstance(online, OnlineRewards) else online.samples


def _forks(mesh: Mesh, planned: Sizes, count: int, samples_each: int) -> Forks:
    where = batch_sharding(mesh, micro=False)

    def of(dtype: Any, *rest: int) -> Any:
        return struct((count, samples_each, *rest), dtype, where)

    length = bucket(planned.tokens) + 1
    number = of(np.int32)
    return Forks(number, number, of(np.int32, length), number, number, of(np.uint32, 2))
