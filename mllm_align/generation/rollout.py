"""Responses sampled from the current policy during a run, entirely on the devices.

Shapes: M micro-batches of B rows as in training, K responses, R = maximum tokens of a response.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from mllm_align.batch import Prefix, PromptGroup
from mllm_align.config import SamplingConfig
from mllm_align.data.distortion import signal_share
from mllm_align.data.layout import Layout
from mllm_align.generation.decode import compiler_options
from mllm_align.generation.loop import Forks, begin, run
from mllm_align.generation.sampling import choose, uniform
from mllm_align.models.bundle import base_shardings, make_model
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.registry import family_of
from mllm_align.models.policy import image_features, policy_variables
from mllm_align.models.vlm import VisionLanguageModel
from mllm_align.sharding import batch_sharding, constrain, replicated, traced_within

POSITIONS = 8  # positions of a response whose logits are computed at a time


class Rollout(NamedTuple):
    """Sampled responses. tokens: ids, including the end of sequence. lengths: number of tokens. logps: nats
    per token, of the policy that sampled them, before temperature and filters. finite: whether all logits
    from which the tokens were sampled are finite."""

    tokens: Int[Array, "M B K R"]
    lengths: Int[Array, "M B K"]
    logps: Float[Array, "M B K R"]
    finite: Bool[Array, "M B K"]


@lru_cache(maxsize=8)
def rollout_program(
    config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any, sampling: SamplingConfig
) -> Any:
    """Jitted rollout(params, trained, batch, keys, stop_mask) -> Rollout, replicated.

    batch: prompts; its responses are ignored. keys [M, B, K, 2]: see `sampling.random_key`. stop_mask [V]
    bool: the ids that end a response. Each prompt is prefilled once, then K responses are decoded.
    """
    model = make_model(config)

    def rollout(params: Any, trained: Any, batch: PromptGroup, keys: Any, stop_mask: Any) -> Rollout:
        policy = policy_variables(params, trained, lora_scale, dtype)

        def part(group_and_keys: tuple[PromptGroup, UInt32[Array, "B K 2"]]) -> Rollout:
            return sample(model, policy, *group_and_keys, stop_mask, sampling, dtype)

        return each_part(part, (batch, keys))

    rows, on_all = batch_sharding(mesh), replicated(mesh)
    shardings = base_shardings(config, mesh), None, rows, rows, on_all
    options = {"in_shardings": shardings, "compiler_options": compiler_options(mesh)}
    return jax.jit(traced_within(mesh, rollout, dtype), **options, out_shardings=on_all)


def each_part(part: Any, micro: Any) -> Any:
    """Map `part` over the micro-batches sequentially; a single one needs no loop."""
    if len(jax.tree.leaves(micro)[0]) == 1:
        return jax.tree.map(lambda x: x[None], part(jax.tree.map(lambda x: x[0], micro)))
    return jax.lax.map(part, micro)


def sample(
    model: VisionLanguageModel,
    policy: Any,
    group: PromptGroup,
    keys: UInt32[Array, "B K 2"],
    stop_mask: Bool[Array, " V"],
    sampling: SamplingConfig,
    dtype: Any,
) -> Rollout:
    """K responses to each prompt of one micro-batch, of at most sampling.max_tokens tokens."""
    prompt, (size, count, _) = group.prefix, keys.shape
    features = image_features(model, policy, prompt, dtype)
    prefix: Any = model.apply(policy, features, prompt, method="prefill")

    def last(x: Any) -> Any:
        return jnp.broadcast_to(jnp.take_along_axis(x, prompt.last, axis=1), (size, count))

    tokens = jnp.zeros((size, count, sampling.max_tokens + 1), prompt.tokens.dtype)
    forks = Forks(
        order=last(prompt.order),
        rope=last(prompt.rope[:, 0]),
        tokens=tokens.at[:, :, 0].set(last(prompt.tokens)),
        forced=jnp.ones((size, count), jnp.int32),
        limit=jnp.full((size, count), sampling.max_tokens, jnp.int32),
        keys=keys,
    )
    state = run(model, policy, prefix, begin(prefix, forks, logps=True), stop_mask, sampling)
    logps: Any = state.logps
    return Rollout(state.tokens[:, :, 1:], state.lengths - 1, logps[:, :, 1:], state.finite)


@lru_cache(maxsize=8)
def pick_program(mesh: Mesh) -> Any:
    """Jitted pick(batch, micro, row) -> batch [C, b, ...] of the rows batch[micro[c, b], row[c, b]]."""

    def pick(batch: PromptGroup, micro: Int[Array, "C b"], row: Int[Array, "C b"]) -> PromptGroup:
        return jax.tree.map(lambda x: x[micro, row], batch)

    rows, on_all = batch_sharding(mesh), replicated(mesh)
    return jax.jit(traced_within(mesh, pick), in_shardings=(rows, on_all, on_all), out_shardings=rows)


@lru_cache(maxsize=8)
def features_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any) -> Any:
    """features(params, trained, prefix [M, B, ...], m) -> [B, T*I, F] on every device, jitted.

    The vision tower's features of micro-batch m, whose images are already on the devices.
    """
    model = make_model(config)

    def features(params: Any, trained: Any, prefix: Prefix, micro: Int[Array, ""]) -> Any:
        policy = policy_variables(params, trained, lora_scale, dtype)
        part: Any = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, micro, keepdims=False), prefix)
        return image_features(model, policy, part, dtype)

    rows, on_all = batch_sharding(mesh), replicated(mesh)
    shardings = base_shardings(config, mesh), None, rows, on_all
    return jax.jit(traced_within(mesh, features, dtype), in_shardings=shardings, out_shardings=on_all)


@lru_cache(maxsize=8)
def distorted_program(config: ModelConfig, mesh: Mesh, lora_scale: float, dtype: Any, steps: int) -> Any:
    """distorted(params, trained, batch, keys) -> (tokens [M, B, R], finite [M, B]) on every device, jitted.

    Token t is sampled from pi(. | x~, y+_{<t}): y+ is each group's first response, x~ its image after
    `steps` steps of noise (POVID, as described in arXiv 2407.02477). keys [M, B, 2]. finite: whether all
    logits from which the tokens along y+ were sampled are finite.
    """
    model, layout = make_model(config), family_of(config).layout(config)
    sampling = SamplingConfig()

    def part(
        policy: Any, group: PromptGroup, keys: UInt32[Array, "B 2"]
    ) -> tuple[Int[Array, "B R"], Bool[Array, " B"]]:
        pixels = group.prefix.pixels
        patches = jax.vmap(lambda x, key: noisy(x, steps, key, layout))(pixels.patches, keys)
        pixels = pixels._replace(patches=patches).astype(dtype)
        features = model.apply(policy, pixels, method="features")
        chosen = group.responses.take((0,))
        hidden: Any = model.apply(policy, features, group.prefix, chosen, method="hidden")
        last, states = hidden
        # [B, R, D]: the hidden state before each response token, which predicts it
        before = jnp.concatenate([last[:, None], states[:, 0, :-1]], axis=1)
        kernel: Any = model.apply(policy, method=lambda m: m.decoder.unembedding())
        size, length, _ = before.shape

        def draw(chunk: tuple[Any, Any]) -> Any:
            states, at = chunk  # [B, c, D], [c]
            logits = jnp.matmul(states, kernel, preferred_element_type=jnp.float32)
            uniforms = uniform(keys[:, None], at[None]).reshape(-1, 2)
            sampled = choose(logits.reshape(size * at.size, -1), uniforms, sampling).reshape(size, -1)
            return sampled, jnp.isfinite(logits).all(-1)

        count = -(-length // POSITIONS)
        before = jnp.pad(before, ((0, 0), (0, count * POSITIONS - length), (0, 0)))
        chunks = before.reshape(size, count, POSITIONS, -1).swapaxes(0, 1)
        at = jnp.arange(count * POSITIONS, dtype=jnp.int32).reshape(count, POSITIONS)
        sampled, finite = (
            constrain(each.swapaxes(0, 1).reshape(size, -1)[:, :length], "rows", None)
            for each in jax.lax.map(draw, (chunks, at))  # [count, B, c]
        )
        return sampled, (finite | ~chosen.mask[:, 0]).all(-1)

    def distorted(params: Any, trained: Any, batch: PromptGroup, keys: Any) -> Any:
        policy = policy_variables(params, trained, lora_scale, dtype)
        return each_part(lambda both: part(policy, *both), (batch, keys))

    rows, on_all = batch_sharding(mesh), replicated(mesh)
    shardings = base_shardings(config, mesh), None, rows, rows
    return jax.jit(traced_within(mesh, distorted, dtype), in_shardings=shardings, out_shardings=on_all)


def noisy(
    patches: Float[Array, "T N C"], steps: int, key: UInt32[Array, " 2"], layout: Layout
) -> Float[Array, "T N C"]:
    """As `distortion.noisy`, on the device."""
    left = signal_share(steps)
    drawn = jax.random.wrap_key_data(key, impl="threefry2x32")
    draw = partial(jax.random.normal, jax.random.fold_in(drawn, 1 << 20), dtype=patches.dtype)
    return left**0.5 * patches + (1 - left) ** 0.5 * layout.noise(draw, patches.shape)
