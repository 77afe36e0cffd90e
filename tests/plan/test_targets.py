"""What is planned for: lengths, programs, rows, and bytes that stay on a chip meanwhile."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from small_model import small

from mllm_align import (
    MDPO,
    MRPO,
    PPO,
    SFT,
    BDHSConfig,
    Config,
    Distorted,
    OnlineRewards,
    RewardModel,
    SceneOracle,
)
from mllm_align.batch import Shape
from mllm_align.config import MeshConfig, OnlineBDHS, OnlinePairs, SamplingConfig
from mllm_align.errors import InputError
from mllm_align.models.families.registry import presets
from mllm_align.plan.targets import (
    cache_bytes,
    check,
    lower,
    names,
    resident_bytes,
    rows,
    samples,
    sizes,
    under_way_bytes,
)
from mllm_align.sharding import make_mesh
from mllm_align.training.programs import abstract_base

PRESETS = presets()

ORACLE = OnlinePairs(annotator=SceneOracle(), samples=4)
REWARDS = OnlineRewards(annotator=RewardModel())


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices())


# ---- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prefix", "tiles"), [("llava-1.6-7b", 3072, 5), ("llava-1.5-7b", 704, 1)])
def test_longest_prompt(name, prefix, tiles):
    """576 + 48 x 49 embeddings and 128 tokens of text; 576 and 128."""
    planned = sizes(Config(), presets()[name])
    assert (planned.shape.prefix, planned.shape.response, planned.shape.tiles) == (prefix, 256, tiles)
    assert sizes(Config(), presets()[name], prefix=100, response=10).shape.prefix == 128


def test_lengths_are_padded_as_the_config_pads():
    config = Config(data=dataclasses.replace(Config().data, multiple=100), objective=SFT())
    found = sizes(config, presets()["llava-1.5-7b"], prefix=601, response=1)
    assert (found.shape.prefix, found.shape.response, found.responses) == (700, 100, 1)


def test_a_rejected_image_is_a_second_prefix_of_one_response():
    planned = sizes(Config(objective=MDPO()), presets()["llava-1.6-7b"])
    assert planned.shape == Shape(3072, 256, 5, ((3072, 5),)) and planned.views == ((0, 1), (0,))
    assert planned.responses == 2 and planned.shape.tokens(planned.views) == 2 * 3072 + 3 * 256


def test_tokens_that_are_generated():
    """Of the responses that are made; without any, as `generate` makes them."""
    short = SamplingConfig(max_tokens=33)
    for config, tokens in (
        (Config(), 512),
        (Config(online=dataclasses.replace(ORACLE, sampling=short)), 33),
        (BDHSConfig(sampling=short), 33),
    ):
        assert sizes(config, presets()["llava-1.5-7b"]).tokens == tokens
    assert sizes(BDHSConfig(), presets()["llava-1.5-7b"]).responses == 0


# ---- programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, programs",
    [
        (Config(), "train"),
        (Config(reference="stored"), "train reference"),
        (Config(reference="stored", objective=SFT()), "train"),
        (Config(objective=MRPO(references=("a",))), "train reference"),
        (Config(online=ORACLE), "train features prefill decode"),
        (Config(online=OnlineBDHS()), "train features prefill decode"),
        (Config(online=Distorted()), "train"),
        (Config(objective=PPO(), online=REWARDS), "train features prefill decode score reward"),
        (BDHSConfig(), "features prefill decode"),
    ],
)
def test_programs_of_a_config(config, programs):
    assert names(config) == tuple(programs.split())


def test_rows_of_a_program(mesh):
    """A step takes the batch; generation beside it eight prompts, or a micro-batch where responses are
    made online; all devices take as many."""
    config = Config(batch_size=48, micro_batches=2)
    online = dataclasses.replace(config, online=ORACLE)
    assert [rows(config, mesh, p) for p in ("train", "reference", "decode")] == [48, 24, 8]
    assert [rows(online, mesh, p) for p in ("train", "decode")] == [48, 24]
    assert rows(BDHSConfig(batch_size=9), mesh, "decode") == 16
    assert [rows(c, mesh, "prefill") for c in (config, online, BDHSConfig(batch_size=9))] == [8, 24, 8]
    own = dataclasses.replace(online, online=dataclasses.replace(ORACLE, mesh=MeshConfig(data=1, tensor=8)))
    assert rows(dataclasses.replace(own, batch_size=6), mesh, "decode") == 3


def test_continuations_of_a_prompt():
    assert [samples(c) for c in (Config(), Config(online=ORACLE), BDHSConfig())] == [1, 4, 1]


@pytest.mark.parametrize(
    "program, config",
    [
        ("reference", Config(reference="stored", batch_size=8)),
        ("features", BDHSConfig()),
        ("prefill", BDHSConfig()),
        ("decode", Config(online=ORACLE, batch_size=8)),
        ("score", Config(objective=PPO(), online=REWARDS, batch_size=8)),
        ("reward", Config(objective=PPO(), online=REWARDS, batch_size=8)),
    ],
)
def test_a_program_is_lowered_from_shapes_alone(mesh, program, config):
    """The base is its first argument; nothing is allocated."""
    model = small(pinpoints=())
    before = len(jax.live_arrays())
    lowered = lower(program, config, model, mesh, sizes(config, model, prefix=600, response=32))
    assert len(jax.live_arrays()) == before
    shapes = [x.shape for x in jax.tree.leaves(lowered.in_avals)]
    d = model.decoder
    assert (d.vocab, d.hidden) in shapes and (d.layers - 1, d.hidden, d.mlp) in shapes


def test_a_mesh_that_does_not_go_with_the_config(mesh):
    model = small(pinpoints=())
    for config in (Config(batch_size=8), BDHSConfig()):
        assert check(config, model, mesh) == []
    with pytest.raises(InputError):
        check(Config(batch_size=6), model, mesh)
    tensor = make_mesh(MeshConfig(data=1, tensor=8), jax.devices())
    odd = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, heads=6, kv_heads=6))
    for config in (Config(batch_size=8), BDHSConfig()):
        with pytest.raises(InputError):
            check(config, odd, tensor)


# ---- memory ------------------------------------------------------------------------------------------


def test_online_runs_hold_their_state_while_they_generate():
    """float32 parameters, two moments, and the base a second time where rollouts have their own mesh."""
    model, mesh = small(pinpoints=()), make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices())
    base = sum(x.size for x in jax.tree.leaves(abstract_base(model, mesh, jnp.float32)))
    config = Config(lora=None, freeze=(), batch_size=8, online=OnlinePairs(annotator=SceneOracle()))
    assert [resident_bytes(name, Config(), model, mesh) for name in ("train", "decode")] == [0, 0]
    assert resident_bytes("train", config, model, mesh) == 0
    others = Config(objective=MRPO(references=("a",)), dtype="float32")
    assert resident_bytes("reference", others, model, mesh) == pytest.approx(base * 4 / 8, rel=0.01)
    moments = 3 * base * 4 / 8
    assert resident_bytes("decode", config, model, mesh) == pytest.approx(moments, rel=0.01)
    whole = dataclasses.replace(config, online=dataclasses.replace(config.online, mesh=MeshConfig(data=8)))
    assert resident_bytes("train", whole, model, mesh) == base * 4
    assert resident_bytes("decode", whole, model, mesh) == pytest.approx(moments + base * 4 / 8, rel=0.01)
    rewards = dataclasses.replace(config, objective=PPO(), online=REWARDS)
    frozen = resident_bytes("train", rewards, model, mesh)
    assert frozen == pytest.approx(base * 4 / 8, rel=0.01), "the reference of what is trained"
    assert resident_bytes("score", rewards, model, mesh) == pytest.approx(2 * moments, rel=0.01)


def test_cached_keys_and_values_by_hand(mesh):
    """Of 3 layers, 8 heads of 128 in float32: on each of 8 devices one prompt of 600 tokens, padded to 768,
    and its 4 responses of 33 tokens, padded to 48."""
    model = small(pinpoints=())
    config = Config(
        batch_size=8, online=dataclasses.replace(ORACLE, sampling=SamplingConfig(max_tokens=33))
    )
    planned = sizes(config, model, prefix=600)
    each = 2 * 3 * 8 * 128 * 4
    assert cache_bytes(config, model, mesh, planned) == each * (768 + 4 * 48)


def test_a_prefill_finds_the_whole_batch_there(mesh):
    """Of 3 layers, 8 heads of 128 in float32: on each of 8 devices two rows, each with its prefix of 768
    and one continuation of 33 tokens, padded to 48; a rollout begins with all of its rows."""
    model = small(pinpoints=())
    config = BDHSConfig(batch_size=16, dtype="float32", sampling=SamplingConfig(max_tokens=33))
    found = under_way_bytes(config, model, mesh, sizes(config, model, prefix=600))
    assert found == pytest.approx(2 * 2 * 3 * 8 * 128 * 4 * (768 + 48), rel=0.05)
    assert rows(config, mesh, "prefill") == 8
    rollout = Config(batch_size=8, online=ORACLE)
    assert under_way_bytes(rollout, model, mesh, sizes(rollout, model, prefix=600)) == 0
