"""A model's weights and batches from its shape alone: random, made on the device where they are large."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_check.lines import Figures
from mllm_align.batch import Group, HostPrefix, Pixels, Shape, pad, stack
from mllm_align.config import Config, LoraConfig, MeshConfig, Remat, load_config
from mllm_align.models.bundle import compute_dtype
from mllm_align.models.config import DecoderConfig, ModelConfig
from mllm_align.models.families.llava.config import LlavaConfig
from mllm_align.models.families.llava.vision import ClipConfig
from mllm_align.models.families.registry import family_of, presets
from mllm_align.models.lora import init_lora
from mllm_align.sharding import batch_sharding, make_mesh
from mllm_align.training.flops import peak_flops
from mllm_align.training.programs import Program, abstract_base
from mllm_align.training.step import TrainState

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "dpo_llava16_7b.py"


@dataclass(frozen=True)
class Sizes:
    """What speed is measured on. prefix, response: tokens. steps: pairs of a train step, and what it keeps
    for its backward pass; the first is profiled. samples: of each prompt in rollouts. records, sentences,
    chosen, cut: BDHS's rows, forks of each, tokens of the chosen response and of a completion. times: that
    each is timed."""

    name: str
    model: ModelConfig
    rank: int
    prefix: int = 3072
    response: int = 256
    steps: tuple[tuple[int, Remat], ...] = ((2, "dots"), (2, "full"), (4, "dots"))
    samples: tuple[int, ...] = (2, 4)
    prompts: int = 4
    records: int = 8
    sentences: int = 5
    chosen: int = 200
    cut: int = 64
    times: int = 5


LLAVA_7B = Sizes("llava-1.6-7b", presets()["llava-1.6-7b"], rank=128)
TINY = Sizes(
    "tiny",
    LlavaConfig(
        "llava_next",
        ClipConfig(hidden=32, mlp=64, layers=2, heads=4, image_size=28, patch_size=14),
        DecoderConfig(vocab=256, hidden=64, mlp=128, layers=2, heads=4, kv_heads=2, head_dim=16),
        image_token=250,
        pinpoints=((28, 56), (56, 28), (56, 56)),
    ),
    rank=4,
    prefix=48,
    response=8,
    steps=((2, "full"),),
    samples=(2,),
    prompts=2,
    records=2,
    sentences=2,
    chosen=12,
    cut=4,
    times=3,
)


def sizes(tiny: bool) -> Sizes:
    return TINY if tiny else LLAVA_7B


class Held:
    """One device, and the base model's weights on it."""

    def __init__(self, chosen: Sizes):
        self.sizes, self.model = chosen, chosen.model
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        self.dtype = compute_dtype("auto", self.mesh)
        self.params = random_weights(abstract_base(self.model, self.mesh, self.dtype))


def random_weights(shapes: Any) -> Any:
    """Uniform numbers with a deviation of 0.02, norms' scales 1, in one program on the devices.

    Stacked layers are made one by one: what making them takes must not pass for what a step takes.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def make() -> Any:
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
        wide = 0.02 * math.sqrt(3)

        def of(path: Any, leaf: Any, key: Any) -> jax.Array:
            if path[-1].key == "scale":
                return jnp.ones(leaf.shape, leaf.dtype)
            if leaf.ndim < 3:
                return jax.random.uniform(key, leaf.shape, leaf.dtype, -wide, wide)
            layers = jax.random.split(key, leaf.shape[0])
            one = leaf.shape[1:]
            return jax.lax.map(lambda k: jax.random.uniform(k, one, leaf.dtype, -wide, wide), layers)

        return tree.unflatten([of(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)])

    places = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.block_until_ready(jax.jit(make, out_shardings=places)())


def weights(held: list[Held], chosen: Sizes) -> Figures:
    """The line of the weights; they are left in `held`."""
    held.append(Held(chosen))
    leaves = jax.tree.leaves(held[0].params)
    return {
        "model": chosen.name,
        "dtype": str(held[0].dtype),
        "parameters": sum(x.size for x in leaves),
        "bytes": sum(x.nbytes for x in leaves),
        **memory(),
    }


def dpo(chosen: Sizes, pairs: int, remat: Remat) -> Config:
    """The published config with a batch of so many pairs on one device."""
    config = load_config(CONFIG)
    assert config.lora is not None
    lora = LoraConfig(chosen.rank, 2.0 * chosen.rank, config.lora.targets)
    config = replace(config, lora=lora, mesh=MeshConfig(), batch_size=pairs, micro_batches=1)
    return replace(config, dtype="auto", remat=remat)


def begun(held: Held, config: Config, program: Program) -> TrainState:
    """The state before the first step, made on the device."""
    places = jax.tree.map(lambda x: x.sharding, program.state)
    lora: Any = config.lora

    def make(params: Any) -> TrainState:
        own = {name: params[name] for name in program.state.trained.get("params", {})}
        trained: Any = {"params": jax.tree.map(lambda x: x.astype(jnp.float32), own)}
        trained["lora"] = init_lora(held.model.decoder, lora.rank, lora.targets, jax.random.key(0))
        return TrainState(jnp.zeros((), jnp.int32), trained, program.optimizer.init(trained))

    return jax.block_until_ready(jax.jit(make, out_shardings=places)(held.params))


def picture(model: ModelConfig) -> tuple[int, np.ndarray]:
    """(tiles, rows of the image table) of the image that takes the most of both: the largest canvas."""
    layout = family_of(model).layout(model)
    size = max(layout.largest, key=lambda size: size[0] * size[1])
    (run,) = layout.runs(*size, 1, 0)
    return layout.tiles(*size, 1)[0], run.rows


def prompt(model: ModelConfig, prefix: int, rng: np.random.Generator) -> tuple[int, np.ndarray, np.ndarray]:
    """(tiles, tokens, image) of a prompt of so many tokens: text, the image, text."""
    tiles, rows = picture(model)
    text = prefix - len(rows)
    assert text > 1, f"an image takes {len(rows)} of {prefix} tokens"
    image = np.full(prefix, -1, np.int32)
    image[text // 2 : text // 2 + len(rows)] = rows
    words = rng.integers(0, model.image_token, prefix, np.int32)
    return tiles, np.where(image < 0, words, model.image_token).astype(np.int32), image


def noise(model: ModelConfig, rng: np.random.Generator, *tiles: int) -> Pixels:
    """Pixels of so many tiles."""
    layout, v = family_of(model).layout(model), model.vision
    shape = (*tiles, v.patches, v.patch_width)
    patches = layout.noise(lambda shape: rng.standard_normal(shape, np.float32), shape)
    return Pixels(patches, np.zeros((*tiles, v.patches, 2), np.int16))


def batch(held: Held, count: int, responses: int = 2) -> Any:
    """`count` groups at full length, as the train step takes them: one micro-batch, on the device."""
    s, rng = held.sizes, np.random.default_rng(0)

    def group() -> Group:
        tiles, tokens, image = prompt(held.model, s.prefix, rng)
        pixels = noise(held.model, rng, tiles)
        said = rng.integers(0, held.model.image_token, (responses, s.response), np.int32)
        return Group((HostPrefix.causal(tokens, image, pixels),), tuple(said))

    groups = [group() for _ in range(count)]
    shape = Shape(s.prefix, s.response, picture(held.model)[0])
    return jax.device_put(stack([pad(groups, shape, count)]), batch_sharding(held.mesh))


def peak() -> float | None:
    """Published bfloat16 FLOP/s of the one device that is used; None where they are not known."""
    whole = peak_flops()
    return None if whole is None else whole / jax.device_count()


def memory(before: Figures | None = None) -> Figures:
    """Bytes of the device in use, and the most so far in this process; None where it does not say.

    before: as it was; the peak is then told only if it rose, else nothing is known but that it was lower.
    """
    stats = jax.devices()[0].memory_stats() or {}
    found = {"bytes_in_use": stats.get("bytes_in_use"), "peak_bytes": stats.get("peak_bytes_in_use")}
    if before is not None and found["peak_bytes"] == before["peak_bytes"]:
        found |= {"peak_bytes": None, "peak_bytes_below": before["peak_bytes"]}
    return found


def planned_bytes(compiled: Any) -> int | None:
    """What the compiler says that a program takes, its arguments included."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return whole - found.alias_size_in_bytes


def seconds(run: Callable[[], Any], times: int) -> list[float]:
    """Of each of `times` runs, the first of which comes after one that is not timed."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return taken[1:]


def spread(taken: list[float]) -> Figures:
    return {"min": min(taken), "median": statistics.median(taken), "max": max(taken)}
