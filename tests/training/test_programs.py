"""The shapes that a run's programs are made from: those of the arrays that the run then has."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import goldens, union

from mllm_align.align.multi_reference import MRPO
from mllm_align.align.sft import SFT
from mllm_align.align.visual import MDPO
from mllm_align.batch import Group, Shape, pad, stack, with_responses
from mllm_align.config import Config, LoraConfig, MeshConfig
from mllm_align.errors import InputError
from mllm_align.sharding import batch_sharding, make_mesh, replicated
from mllm_align.training.optim import abstract_trained, make_optimizer
from mllm_align.training.programs import (
    abstract_base,
    abstract_state,
    batch_structs,
    check_fits,
    struct,
    train_program,
)

LORA = Config(batch_size=8, lora=LoraConfig(rank=2, alpha=4.0))
FULL = replace(LORA, lora=None)
STORED = replace(FULL, reference="stored")
OTHERS = replace(LORA, objective=MRPO(references=("a", "b")))


@pytest.fixture(scope="module")
def model():
    return goldens("llavanext").config


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_a_struct_knows_its_sharding(mesh):
    made = struct([2, 3], jnp.bfloat16, replicated(mesh))
    assert (made.shape, made.dtype, made.sharding) == ((2, 3), jnp.bfloat16, replicated(mesh))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_base_has_the_shapes_of_the_checkpoint(model, mesh, dtype):
    found, stored = by_path(abstract_base(model, mesh, dtype)), by_path(goldens("llavanext").base)
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in stored.items()}
    assert {x.dtype for x in found.values()} == {jnp.dtype(dtype)}
    cut = [name for name, x in found.items() if not x.sharding.is_fully_replicated]
    assert any("decoder" in name for name in cut) and all(x.sharding.mesh == mesh for x in found.values())


def test_moments_live_where_their_parameters_live(model, mesh):
    """Adam's two, in float32; counters are on every device."""
    trained = abstract_trained(FULL, model, mesh)
    state = abstract_state(trained, make_optimizer(FULL.optim, 10), FULL.objective, replicated(mesh))
    assert state.trained is trained and (state.step.shape, state.step.dtype) == ((), jnp.int32)
    parameters = by_path(trained)
    counts = dict.fromkeys(parameters, 0)
    for name, leaf in by_path(state.optimizer).items():
        owners = [each for each in parameters if name.endswith(each)]
        if not owners:
            assert leaf.shape == () and leaf.sharding.is_fully_replicated
            continue
        (owner,) = owners
        counts[owner] += 1
        parameter = parameters[owner]
        assert (leaf.shape, leaf.sharding, leaf.dtype) == (parameter.shape, parameter.sharding, jnp.float32)
    assert set(counts.values()) == {2}


@pytest.mark.parametrize(
    "config, kept",
    [
        (LORA, {"vision_tower", "projector", "image_newline", "decoder"}),
        (FULL, {"vision_tower", "projector", "image_newline", "decoder"}),
        (STORED, {"vision_tower"}),
        (replace(FULL, objective=SFT()), {"vision_tower"}),
        (replace(STORED, freeze=("decoder",)), {"decoder"}),
        (replace(LORA, reference="stored"), {"vision_tower", "image_newline", "decoder"}),
    ],
)
def test_base_keeps_what_a_reference_or_the_policy_runs(model, mesh, config, kept):
    """Without a live reference, what is replaced is left out."""
    made = train_program(config, model, mesh, steps=10)
    assert set(made.base) == kept


def featured(prefix, model):
    tile = np.zeros((model.vision.tokens, model.vision.features), np.float32)
    return replace(prefix, patches=None, place=None, features=np.stack([tile] * prefix.tiles))


@pytest.mark.parametrize(
    "config",
    [LORA, STORED, replace(LORA, features="stored"), OTHERS],
    ids=["live", "stored", "features", "references"],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_has_the_shapes_of_the_loops(model, mesh, config, micro_batches):
    config = replace(config, micro_batches=micro_batches)
    golden = goldens("llavanext")
    groups = golden.groups()
    rows = config.batch_size // micro_batches
    shape = union(groups)
    if config.features == "stored":
        groups = [replace(each, prefixes=(featured(each.prefix, model),)) for each in groups]
    larger = Shape(shape.prefix + 3, shape.response + 2, shape.tiles + 1)
    batch = stack([pad(groups, larger, rows) for _ in range(micro_batches)])
    if config.reference == "stored":
        batch = with_responses(batch, reference=(np.zeros(batch.responses.tokens.shape, np.float32),))
    if config.objective.references:
        size = micro_batches, rows, 2, *batch.responses.tokens.shape[2:]
        batch = with_responses(batch, references=np.zeros(size, np.float32))
    found = batch_structs(config, model, mesh, larger, ((0, 1),))
    assert jax.tree.structure(found) == jax.tree.structure(batch)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(batch), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding == batch_sharding(mesh)


def test_a_batch_of_an_objective_on_images_has_two_prefixes(model, mesh):
    config = replace(STORED, objective=MDPO(), micro_batches=1)
    groups = [Group(each.prefixes * 2, each.responses) for each in goldens("llavanext").groups()]
    batch = stack([pad(groups, union(groups), config.batch_size)])
    reference = tuple(
        np.zeros((1, config.batch_size, len(view), batch.shape.response), np.float32)
        for view in batch.views
    )
    batch = with_responses(batch, reference=reference)
    found = batch_structs(config, model, mesh, batch.shape, config.objective.views)
    assert jax.tree.structure(found) == jax.tree.structure(batch)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(batch), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_a_step_gives_back_the_state_that_it_takes(model, mesh):
    """Shapes, dtypes and places: so that it can be run again."""
    with jax.numpy_dtype_promotion("standard"):  # as for users; optax mixes dtypes
        made = train_program(LORA, model, mesh, steps=10)
        batch = batch_structs(LORA, model, mesh, Shape(32, 16, 1), ((0, 1),))
        lowered = made.step.lower(made.state, made.base, batch)
    state, metrics, health = lowered.out_info
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(made.state), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics)) and "loss" in metrics
    donated = [info.donated for info in jax.tree.leaves(lowered.args_info)]
    count = len(jax.tree.leaves(made.state))
    assert all(donated[:count]) and not any(donated[count:])
    assert health is not None


@pytest.mark.slow
def test_gradients_of_frozen_weights_are_never_formed(model):
    """Under LoRA: no product in the compiled step has the shape of a frozen kernel, as its gradient would;
    of the low-rank terms and the projector there are such products."""
    config = replace(LORA, lora=LoraConfig(rank=3), batch_size=2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.numpy_dtype_promotion("standard"):
        made = train_program(config, model, mesh, steps=10)
        batch = batch_structs(config, model, mesh, Shape(37, 11, 1), ((0, 1),))  # no width of the model
        text = made.step.lower(made.state, made.base, batch).compile().as_text()
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", text)
    products = {frozenset(map(int, sizes)) for sizes in found}

    def kernels(tree):
        matrices = [x.shape for name, x in by_path(tree).items() if not re.search("norm|bias", name)]
        return {frozenset(shape[-2:]) for shape in matrices if len(shape) > 1}

    trained = kernels(made.state.trained)
    frozen = kernels({name: made.base[name] for name in ("decoder", "vision_tower")}) - trained
    assert frozen and not products & frozen
    assert trained <= products


@pytest.mark.parametrize(
    "batch, micro_batches, fits", [(8, 1, True), (8, 2, True), (6, 1, False), (8, 4, False)]
)
def test_rows_divide_among_the_devices_that_share_a_batch(model, mesh, batch, micro_batches, fits):
    """data x fsdp = 4 of them."""
    config = replace(LORA, batch_size=batch, micro_batches=micro_batches)
    if fits:
        check_fits(config, model, mesh)
    else:
        with pytest.raises(InputError, match=f"batch_size / micro_batches is {batch // micro_batches}; "):
            check_fits(config, model, mesh)
