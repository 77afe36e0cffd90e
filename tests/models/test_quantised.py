"""Matrices in int8: their rounding by hand in float64, which of a model's they are, and where they live."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from goldens import ALL, FIXTURES, goldens
from safetensors.numpy import load_file

from mllm_align.config import MeshConfig
from mllm_align.models.bundle import abstract_params, base_shardings, kept_as, load
from mllm_align.models.huggingface import load_params
from mllm_align.models.quantised import count, scale_of, values_of
from mllm_align.ops.linear import Quantised
from mllm_align.sharding import make_mesh, tree_lookup


def by_path(tree):
    """Path -> leaf; a matrix in int8 is one leaf."""
    leaves = jax.tree.leaves_with_path(
        tree, is_leaf=lambda x: isinstance(x, Quantised) or hasattr(x, "names")
    )
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_rounding_by_hand_in_float64(dtype):
    kernel = np.random.default_rng(0).standard_normal((40, 3, 6)).astype(np.float32)
    kernel[:, 1, 2] = 0
    scale = scale_of(kernel, dtype)
    values, exact = values_of(kernel, scale), scale.astype(np.float64)
    assert scale.dtype == dtype and values.dtype == np.int8
    largest = np.abs(kernel.astype(np.float64)).max(0)
    wanted, rounding = np.where(largest == 0, 1, largest / 127), 1e-6 if dtype is np.float32 else 2**-8
    np.testing.assert_allclose(exact, wanted, rtol=rounding)
    assert np.abs(values).max() <= 127 and (values[:, 1, 2] == 0).all()
    half = np.abs(kernel - values * exact).max(0) / np.where(largest == 0, 1, exact)
    assert half.max() <= 0.5 + 1e-5, "to the nearest multiple, the rounded scale's own"


def test_of_16_bits_the_scale_is_rounded_before_it_divides():
    """So a weight's error stays within half a step: divided by the exact scale, 100.55 would become 100."""
    kernel = np.array([[127 * 1.0019], [100.55]], np.float32)
    scale = scale_of(kernel, ml_dtypes.bfloat16)
    assert scale == 1 and values_of(kernel, scale).ravel().tolist() == [127, 101]
    assert np.rint(100.55 / 1.0019) == 100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_makes_its_channel_not_finite(bad):
    kernel = np.ones((4, 2), np.float32)
    kernel[2, 1] = bad
    scale = scale_of(kernel, np.float32)
    assert np.isfinite(scale).tolist() == [True, False]
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(values_of(kernel, scale)[:, 1] * scale[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_matrices_of_all_blocks_are_kept_in_int8_and_nothing_else(name):
    config = goldens(name).config
    full = by_path(abstract_params(config))
    kept = by_path(abstract_params(replace(config, int8=True)))
    assert full.keys() == kept.keys()
    for path, leaf in kept.items():
        inside = any(part.startswith(("layers", "last")) for part in path.split("."))
        if not (inside and path.endswith("kernel")):
            assert leaf is full[path] or leaf == full[path]
            continue
        names, shape = full[path].names, full[path].value.shape
        inputs = names.index("layers") + 1 if "layers" in names else 0
        assert leaf.values.names == names and leaf.values.value.dtype == jnp.int8
        assert leaf.scale.names == names[:inputs] + names[inputs + 1 :]
        assert leaf.scale.value.shape == shape[:inputs] + shape[inputs + 1 :]
    blocks = [p for p, leaf in kept.items() if isinstance(leaf, Quantised)]
    assert {path.split(".")[0] for path in blocks} == {"decoder", "vision_tower"}
    others = {"decoder.embedding", "vision_tower.patch_embedding.kernel"}
    assert others <= kept.keys() - set(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llavanext", "qwen3_vl"])
def test_a_folder_is_read_in_int8_alike_on_any_mesh(name):
    """Every tensor by hand, and eight devices with matrices cut along both axes."""
    folder = goldens(name).folder.kept(True)
    stored = load_file(folder.path / "model.safetensors")
    found = {}
    for sizes, devices in ((MeshConfig(), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 8)):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        places = base_shardings(folder.config, mesh)
        found[devices] = by_path(load_params(folder, np.float32, tree_lookup(places)))
        for path, leaf in by_path(places).items():
            assert jax.tree.map(lambda x: x.sharding, found[devices][path]) == leaf
    cut = [x for x in found[8].values() if isinstance(x, Quantised) and not x.values.is_fully_replicated]
    assert cut and any(not x.scale.is_fully_replicated for x in cut)
    for path, leaf in found[1].items():
        for one, eight in zip(jax.tree.leaves(leaf), jax.tree.leaves(found[8][path]), strict=True):
            np.testing.assert_array_equal(one, eight)
    for entry in folder.entries:
        leaf = found[1][".".join(entry.path)]
        if isinstance(leaf, Quantised):
            values, scale = (x if entry.layer is None else x[entry.layer] for x in map(np.asarray, leaf))
            kernel = entry.to_ours(stored[folder.stored[entry.name]]).astype(np.float64)
            np.testing.assert_allclose(scale, np.abs(kernel).max(0) / 127, rtol=1e-6)
            assert np.abs(values * scale.astype(np.float64) - kernel).max() <= 0.5001 * scale.max()


@pytest.mark.slow
def test_a_bundle_says_what_it_is_kept_in():
    full = load(FIXTURES / "llava15", "float32")
    kept = kept_as(full, True)
    assert "in float32, blocks in int8" in repr(kept) and "in float32\n" in repr(full)
    assert count(kept.params) == count(full.params) == sum(x.size for x in jax.tree.leaves(full.params))
    assert kept_as(kept, True) is kept
    again = by_path(kept_as(kept, False).params)
    assert all(np.array_equal(leaf, again[path]) for path, leaf in by_path(full.params).items())
