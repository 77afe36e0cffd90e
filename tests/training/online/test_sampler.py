"""The policy on a mesh of rollouts: the same numbers, cut along other axes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from runs import MODEL, TINY, bundle, compiling, same

from mllm_align import InputError, MeshConfig, load
from mllm_align.sharding import batch_shards, make_mesh
from mllm_align.training.online.sampler import Sampler
from mllm_align.training.optim import init_trained

assert compiling  # a fixture


@pytest.fixture(scope="module")
def many():
    """The stored model, its parameters cut in two, the batch in four."""
    return load(MODEL, "float32", make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4]))


def test_on_the_mesh_of_the_run_nothing_moves():
    sampler = Sampler(TINY, bundle(), None)
    assert sampler.bundle.params is bundle().params and sampler.step == 1
    trained = {"a": 1}
    assert sampler.trained(trained) is trained and sampler.policy(trained).trained is trained
    assert sampler.settings == (bundle().config, bundle().mesh, TINY.lora.scale, bundle().dtype)


def test_on_a_mesh_of_its_own_the_policy_is_the_same(many):
    sampler = Sampler(TINY, many, MeshConfig(data=2, tensor=2))
    mesh = sampler.bundle.mesh
    assert list(mesh.devices.flat) == list(many.mesh.devices.flat) and batch_shards(mesh) == 2
    assert sampler.step == 4, "parts of a batch are cut on either mesh"
    assert same(sampler.bundle.params, many.params)
    moved, kept = (x.params["decoder"]["layers"]["up"]["kernel"] for x in (sampler.bundle, many))
    parts = [x.sharding.shard_shape(x.shape) for x in (moved, kept)]
    layers, width, mlp = kept.shape
    assert parts == [(layers, width, mlp // 2), (layers, width // 2, mlp)] and moved.sharding.mesh == mesh
    trained = init_trained(many, TINY)
    moved = sampler.policy(trained).trained
    assert same(moved, trained)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(moved))
    rows = jax.numpy.arange(8.0).reshape(1, 8)
    batch = sampler.batch(rows)
    assert np.array_equal(batch, rows) and batch.sharding.mesh == mesh


def test_a_batch_that_its_devices_cannot_share_is_refused(many):
    config = replace(TINY, batch_size=4, micro_batches=2)
    with pytest.raises(
        InputError, match=r"batch_size / micro_batches is 2; .* a multiple of 4, .*online.mesh"
    ):
        Sampler(config, many, MeshConfig(data=4))
    with pytest.raises(InputError, match="does not make 4 devices"):
        Sampler(config, many, MeshConfig(data=3))
