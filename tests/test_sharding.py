"""One device against eight, cut in every way: the same numbers from every step."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from decoding import CLOSE, ROUNDING, logits, margin
from jobs import Processes
from runs import TINY, compiling

from mllm_align import DataConfig, InputError, MeshConfig, SamplingConfig, load
from mllm_align.batch import pad, stack
from mllm_align.generation.decode import Generator
from mllm_align.generation.respond import prompt_row
from mllm_align.models.bundle import check_mesh
from mllm_align.prepare import prepare
from mllm_align.sharding import assemble, batch_sharding, local_rows, make_mesh, mesh_config
from mllm_align.testbed.demo import make_model, make_pairs
from mllm_align.training.optim import init_trained
from mllm_align.training.programs import batch_structs, train_program
from mllm_align.training.step import TrainState

assert compiling  # a fixture

MESHES = {
    "fsdp 8": MeshConfig(1, 8),
    "tensor 8": MeshConfig(1, 1, 8),
    "2 x 2 x 2": MeshConfig(2, 2, 2),
    "2 slices": MeshConfig(1, 2, 2, slices=2),
}
ALL_AXES = "2 x 2 x 2"
ALL = replace(TINY, lora=None, freeze=(), batch_size=8)
SAMPLED = SamplingConfig(max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight heads, of which two share keys and values: fewer than the tensor axis may have devices."""
    folder = tmp_path_factory.mktemp("sharding")
    make_model(folder / "model", heads=8, kv_heads=2, head_dim=8, vision_heads=8)
    make_pairs(folder / "data", 8, held_out=1)
    return folder


class Side:
    """What a mesh computes on one batch and on some prompts."""

    def __init__(self, folder, mesh):
        self.mesh, self.bundle = mesh, load(folder / "model", "float32", mesh)
        self.encoder, self.records, _ = prepare(
            self.bundle, folder / "data" / "pairs.jsonl", DataConfig(), responses=2
        )

    def step(self, config):
        """(metrics, Adam's first moments, which are a tenth of the gradient) of one step."""
        groups = [self.encoder.group(record) for record in self.records]
        shape = groups[0].shape
        for group in groups:
            shape = shape.union(group.shape)
        program = train_program(config, self.bundle.config, self.mesh, 1)
        batch = assemble(stack([pad(groups, shape, 8)]), batch_sharding(self.mesh))
        wanted = batch_structs(config, self.bundle.config, self.mesh, shape, ((0, 1),))
        assert jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), batch, wanted)
        trained = init_trained(self.bundle, config)
        placed = jax.tree.map(lambda x: x.sharding, program.state)
        assert jax.tree.map(lambda x: x.sharding, trained) == placed.trained
        moments = jax.jit(program.optimizer.init, out_shardings=placed.optimizer)(trained)
        state = TrainState(jax.numpy.zeros((), jax.numpy.int32), trained, moments)
        base = {name: self.bundle.params[name] for name in program.base}
        state, metrics, health = program.step(jax.device_put(state, placed), base, batch)
        assert health.finite
        numbers = {name: float(s) / float(w) for name, (s, w) in metrics.items()}
        del numbers["rewards/accuracy"]  # policy and reference are equal yet: the margin's sign is rounding
        return numbers, jax.device_get(state.optimizer[1].mu)

    def rows(self, decoder):
        features = decoder.features([self.encoder.pixels(record) for record in self.records[:3]])
        return [
            prompt_row(self.encoder, [record], seen, 6, 2, 0)
            for record, seen in zip(self.records, features, strict=False)
        ]


@pytest.fixture(scope="module")
def one(folder):
    return Side(folder, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.fixture(scope="module")
def whole_step(one):
    return one.step(ALL)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(mesh, id=name, marks=() if name == ALL_AXES else pytest.mark.slow)
        for name, mesh in MESHES.items()
    ],
)
def eight(request, folder):
    return Side(folder, make_mesh(request.param))


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=2e-5, abs=2e-5)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-4)


def test_losses_and_gradients(eight, whole_step):
    assert_same(eight.step(ALL), whole_step)


@pytest.mark.slow
def test_losses_and_gradients_of_low_rank_terms(folder, one):
    config = replace(TINY, batch_size=8)
    assert_same(Side(folder, make_mesh(MeshConfig(2, 2, 2))).step(config), one.step(config))


@pytest.mark.slow
def test_decoding(eight, one):
    """Sampled tokens, and the logits after each of them where one device's tokens are given."""
    sides = [(side, Generator(side.bundle, SAMPLED, 3)) for side in (one, eight)]
    stop_mask = np.zeros(one.bundle.config.decoder.vocab, bool)
    (rows, tokens), (others, found) = [
        (rows := side.rows(decoder), decoder(rows, stop_mask)) for side, decoder in sides
    ]
    given = [list(each) for each in tokens]
    wanted = logits(sides[0][1], one.bundle, rows, given)
    seen = logits(sides[1][1], eight.bundle, others, given)
    for mine, theirs, row in zip(seen, wanted, rows, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=CLOSE)
        assert min(margin(x, f.key, SAMPLED) for x, f in zip(theirs, row.forks, strict=True)) > ROUNDING
    assert jax.tree.all(jax.tree.map(np.array_equal, found, tokens))


def shards(leaf):
    return leaf.addressable_shards[0].data.size * 8 // leaf.size


def test_every_large_parameter_is_cut(folder):
    """Of fsdp 2 x tensor 4, each kernel is cut eight-fold, but for what does not divide."""
    bundle = load(folder / "model", "float32", make_mesh(MeshConfig(1, 2, 4)))
    decoder, tower = (bundle.params[name] for name in ("decoder", "vision_tower"))
    for name in ("q", "o", "gate", "up", "down"):
        assert shards(decoder["layers"][name]["kernel"]) == 1, name
    for name in ("q", "k", "v", "o", "fc_1", "fc_2"):
        assert shards(tower["layers"][name]["kernel"]) == 1, name
    assert shards(decoder["embedding"]) == shards(decoder["head"]) == 1
    assert shards(bundle.params["projector"]["linear_1"]["kernel"]) == 1
    assert shards(decoder["layers"]["k"]["kernel"]) == 4, "two key heads are not cut into four"
    assert check_mesh(bundle.config, bundle.mesh) == ["2 key-value heads"]


def test_heads_that_do_not_divide_are_refused(folder):
    bundle = load(folder / "model", "float32", make_mesh(MeshConfig(), jax.devices()[:1]))
    odd = replace(bundle.config, decoder=replace(bundle.config.decoder, heads=6))
    with pytest.raises(InputError, match=r"mesh.tensor is 8.* 6 attention heads; take one of 1, 2, "):
        check_mesh(odd, make_mesh(MeshConfig(1, 1, 8)))


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(1, -1, 2), (1, 1, 4, 2)),
        (MeshConfig(slices=2), (2, 4, 1, 1)),
        (MeshConfig(2, 2, -1, slices=2), (2, 2, 2, 1)),
    ],
)
def test_mesh_sizes(config, sizes):
    assert tuple(make_mesh(config).shape.values()) == sizes


@pytest.mark.parametrize(
    "config", [MeshConfig(3), MeshConfig(4, 4), MeshConfig(slices=3), MeshConfig(-1, 16)]
)
def test_meshes_that_do_not_fit_are_refused(config):
    with pytest.raises(InputError, match="does not make 8 devices; set --mesh"):
        make_mesh(config)


def test_settings_of_a_mesh_make_it_again():
    for config in (MeshConfig(), MeshConfig(1, -1, 2), MeshConfig(2, 2, -1, slices=2)):
        mesh = make_mesh(config)
        assert make_mesh(mesh_config(mesh.shape)).shape == mesh.shape
    assert mesh_config({"fsdp": 4}) == MeshConfig(1, 4, 1, slices=1)


# ---- arrays of several processes ---------------------------------------------------------------------


def test_rows_of_this_process():
    """All of them where one process has all devices."""
    assert local_rows(make_mesh(MeshConfig(2, 2, 2)), 8) == list(range(8))


SEVERAL = """
import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mllm_align import processes
from mllm_align.sharding import AXES, assemble, batch_sharding, local_rows, replicated

processes.start(30, 30)
whole = np.arange(2 * 12 * 2.0).reshape(2, 12, 2)
for order in (range(6), (5, 4, 3, 2, 1, 0), (0, 3, 1, 4, 2, 5)):
    for shape in ((1, 3, 1, 2), (1, 6, 1, 1), (1, 2, 3, 1), (1, 1, 1, 6), (3, 1, 2, 1)):
        devices = np.array([jax.devices()[i] for i in order]).reshape(shape)
        mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)
        rows, where = local_rows(mesh, 12), batch_sharding(mesh)
        made = [assemble({"a": whole[:, rows]}, where, 12)["a"], assemble(whole, where)]
        made.append(assemble(whole, replicated(mesh)))
        for array in made:
            assert array.shape == whole.shape
            assert all(np.array_equal(s.data, whole[s.index]) for s in array.addressable_shards)
"""


@pytest.mark.slow
def test_every_process_gives_its_own_rows(tmp_path):
    """Also where devices of two processes take turns, and where both hold some of the rows."""
    Processes(tmp_path / "several", 2, ["-c", SEVERAL], devices=3).done()
