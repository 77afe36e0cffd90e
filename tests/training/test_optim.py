"""Rates over a run, and which part is trained at which rate."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import goldens
from runs import FULL, TINY, bundle, compiling

from mllm_align import Config, LoraConfig, OptimConfig
from mllm_align.training.optim import init_trained, make_optimizer, schedule, trained_parts

assert compiling  # a fixture


def rates(steps, **settings):
    rate = schedule(OptimConfig(**settings), 1.0, steps)
    return [float(rate(step)) for step in range(steps)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_stairs_from_the_first_step(kind):
    seen = rates(20, schedule=kind, warmup=0.2)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(seen) == pytest.approx(1.0)


def test_after_warm_up():
    assert rates(10, schedule="constant", warmup=0.0) == [1.0] * 10
    assert rates(10, schedule="linear", warmup=0.0) == pytest.approx(np.linspace(1, 0, 11)[:10])
    wave = (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    assert rates(10, schedule="cosine", warmup=0.0) == pytest.approx(wave, abs=1e-6)
    for kind in ("linear", "cosine"):
        end = schedule(OptimConfig(schedule=kind, warmup=0.3), 1.0, 10)(10)
        assert float(end) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("steps, warmup", [(1, 0.0), (1, 0.9), (2, 0.5), (3, 0.99)])
def test_short_runs_have_finite_rates(steps, warmup):
    seen = rates(steps, warmup=warmup)
    assert all(0 < rate <= 1 for rate in seen), seen


def trees():
    """A LoRA run's tree and a full one's, with gradients."""
    ones = lambda *shape: jnp.ones(shape, jnp.float32)  # noqa: E731
    projector = {"linear_1": {"kernel": ones(3, 3)}}
    lora = {"decoder": {"layers": {"q": {"a": ones(1, 3, 2), "b": ones(1, 2, 3)}}}}
    full = {"projector": projector, "decoder": {"norm": ones(3)}}
    return {"lora": {"params": {"projector": projector}, "lora": lora}, "full": {"params": full}}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_projector_moves_at_its_own_rate(kind):
    """Adam's first step is the rate itself, whatever the gradient's size."""
    trained = trees()[kind]
    settings = OptimConfig(1e-3, projector_learning_rate=5e-3, schedule="constant", warmup=0.0)
    optimizer = make_optimizer(settings, 10)
    grads = jax.tree.map(lambda x: 0.01 * x, trained)
    updates, _ = optimizer.update(grads, optimizer.init(trained), trained)
    for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]:
        rate = 5e-3 if "projector" in jax.tree_util.keystr(path) else 1e-3
        assert np.asarray(leaf) == pytest.approx(-rate, rel=1e-4), jax.tree_util.keystr(path)


def test_clip_is_over_all_parts_together_and_decay_is_decoupled():
    trained = trees()["lora"]
    grads = jax.tree.map(lambda x: 100 * x, trained)
    settings = OptimConfig(1e-3, schedule="constant", warmup=0.0, clip=1.0, eps=1.0, b1=0.0, b2=0.0)
    optimizer = make_optimizer(settings, 10)
    updates, _ = optimizer.update(grads, optimizer.init(trained), trained)
    each = 100 / float(optax.tree.norm(grads))  # what is left of a gradient under norm 1
    for leaf in jax.tree.leaves(updates):
        assert np.asarray(leaf) == pytest.approx(-1e-3 * each / (each + 1), rel=1e-4)

    decaying = make_optimizer(replace(settings, weight_decay=0.1), 10)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    updates, _ = decaying.update(zeros, decaying.init(trained), trained)
    for leaf, value in zip(jax.tree.leaves(updates), jax.tree.leaves(trained), strict=True):
        assert np.asarray(leaf) == pytest.approx(-1e-3 * 0.1 * np.asarray(value), rel=1e-4)


@pytest.mark.parametrize(
    "config, name, parts",
    [
        (Config(), "llavanext", {"projector"}),
        (Config(lora=None), "llavanext", {"projector", "image_newline", "decoder"}),
        (Config(lora=None), "llava15", {"projector", "decoder"}),
        (Config(lora=None, freeze=("decoder",)), "llava15", {"vision_tower", "projector"}),
        (Config(optim=OptimConfig(projector_learning_rate=0.0)), "llavanext", set()),
    ],
)
def test_trained_parts(config, name, parts):
    assert set(trained_parts(config, goldens(name).config)) == parts


def test_training_starts_where_the_checkpoint_is():
    """In float32 from the files, even where the computation is in 16 bits."""
    half = replace(bundle(), params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), bundle().params))
    for config in (TINY, FULL):
        trained = init_trained(half, config)
        for part, values in trained["params"].items():
            same = jax.tree.map(lambda a, b: bool((a == b).all()), values, bundle().params[part])
            assert all(jax.tree.leaves(same)) and jax.tree.leaves(values)[0].dtype == jnp.float32
    config = replace(TINY, lora=LoraConfig(rank=3, targets=("q", "down")))
    decoder = init_trained(bundle(), config)["lora"]["decoder"]
    layers = decoder["layers"]
    for stack in (layers, decoder["last"]):
        assert set(stack) == {"q", "down"}
        for pair in stack.values():
            assert pair["a"].shape[-1] == 3 and np.any(pair["a"]) and not np.any(pair["b"])
    again = init_trained(bundle(), replace(config, seed=1))["lora"]["decoder"]["layers"]
    assert np.any(np.asarray(again["q"]["a"] != layers["q"]["a"]))
