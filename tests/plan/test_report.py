"""The arithmetic of the bound, and what the verdict advises."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align import DPO, SFT, Averaged, BDHSConfig, Config, DataConfig, Distorted, LoraConfig
from mllm_align.config import MeshConfig, OnlinePairs, SceneOracle
from mllm_align.errors import InputError
from mllm_align.models.presets import PRESETS
from mllm_align.ops.splash import _blocks
from mllm_align.plan import compiled as compiling
from mllm_align.plan import hlo
from mllm_align.plan.chips import GIB, topology
from mllm_align.plan.compiled import Compiled, buffers, splash_flops, total
from mllm_align.plan.counts import Collective, Counts
from mllm_align.plan.hlo import Instruction
from mllm_align.plan.planner import meshes, plan
from mllm_align.plan.report import program_plan, program_text, verdict
from mllm_align.plan.targets import resident_bytes, sizes
from mllm_align.sharding import make_mesh
from mllm_align.training.programs import abstract_base

WHERE = topology("v5e:4x4")
METADATA = {"rows": 32, "devices": 16, "mesh": {"slice": 1, "data": 1, "fsdp": 16, "tensor": 1}}


def compiled(temporaries=4 * GIB, **counts):
    memory = {"arguments": 3 * GIB, "outputs": 2 * GIB, "aliased": 2 * GIB, "temporaries": temporaries}
    return Compiled(memory, None, Counts(**counts), METADATA, 1.0)


def test_bound_is_the_slowest_part():
    ring = Collective("all-gather", 16, 1, count=1, sent=400e9)
    made = program_plan(
        "train", compiled(flops=197e12, hbm_bytes=819e9, collectives={0: ring}), WHERE, 1e12, {"pairs": 32}
    )
    assert made.parts == {"compute": 1.0, "memory": 1.0, "interconnect": 2.0}
    assert (made.bound, made.limit, made.rates) == (2.0, "interconnect", {"pairs/s": 16.0})
    assert made.needed == 7 * GIB and made.fits


def test_what_crosses_slices_takes_the_network():
    crossing = Collective("all-reduce", 2, 2, count=1, sent=3.125e9)
    made = program_plan("train", compiled(collectives={0: crossing}), topology("2xv5e:4x4"), 1, {})
    assert made.limit == "network" and made.bound == 1.0


def test_what_a_run_holds_meanwhile_counts():
    held = dataclasses.replace(compiled(), metadata=METADATA | {"resident": 10 * GIB})
    made = program_plan("decode", held, WHERE, 1, {})
    assert made.needed == 17 * GIB and not made.fits
    assert "resident besides 10.00" in program_text(made)


def test_online_runs_hold_their_state_while_they_generate():
    """float32 parameters, two moments, and the base a second time where rollouts have their own mesh."""
    model, mesh = small(pinpoints=()), make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices())
    base = sum(x.size for x in jax.tree.leaves(abstract_base(model, mesh, jnp.float32)))
    config = Config(lora=None, freeze=(), batch_size=8, online=OnlinePairs(annotator=SceneOracle()))
    assert [resident_bytes(name, Config(), model, mesh) for name in ("train", "decode")] == [0, 0]
    assert resident_bytes("train", config, model, mesh) == 0
    moments = 3 * base * 4 / 8
    assert resident_bytes("decode", config, model, mesh) == pytest.approx(moments, rel=0.01)
    whole = dataclasses.replace(config, online=dataclasses.replace(config.online, mesh=MeshConfig(data=8)))
    assert resident_bytes("train", whole, model, mesh) == base * 4
    assert resident_bytes("decode", whole, model, mesh) == pytest.approx(moments + base * 4 / 8, rel=0.01)


def test_no_bound_where_peaks_are_unknown():
    made = program_plan("train", compiled(flops=1e12), None, 1e12, {"pairs": 32})
    assert made.bound is None and made.fits and "bound" not in program_text(made)


def test_verdict_says_what_to_change():
    config, mesh = Config(batch_size=32), METADATA["mesh"]
    fits = program_plan("train", compiled(), WHERE, 1, {})
    assert verdict([fits], config, mesh, WHERE).startswith(
        "fits: train needs 7.00 of 15.75 GiB a chip, 8.75"
    )
    large = program_plan("train", compiled(temporaries=14 * GIB), WHERE, 1, {})
    words = verdict([fits, large], config, mesh, WHERE)
    assert words.startswith("does not fit: train needs 17.00 of 15.75 GiB a chip; run fewer rows at once")
    assert "micro_batches 2" in words and "reference stored" in words and "mesh.tensor 2" in words
    assert "\n" not in words


def test_advice_starts_with_what_is_not_cut():
    mesh = {"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}
    large = program_plan("train", compiled(temporaries=14 * GIB), WHERE, 1, {})
    words = verdict([large], Config(lora=None, remat="none"), mesh, WHERE)
    assert "chip; cut the parameters further (mesh.fsdp 16, mesh.data 1)" in words
    assert "remat full" in words and "lora" in words


def test_a_refusal_of_the_compiler_is_a_verdict():
    said = "RESOURCE_EXHAUSTED: HLO temporaries (17.16G) exceeds available HBM (15.75G). See"
    refused = program_plan("train", Compiled(None, said, None, METADATA, 1.0), WHERE, 1, {})
    words = verdict([refused], Config(), METADATA["mesh"], WHERE)
    assert not refused.fits
    assert words.startswith("does not fit: train needs 17.16 GiB of temporaries alone, of 15.75 a chip; ")
    assert "17.16" in program_text(refused)


def test_memory_from_the_list_of_allocations():
    text = """BufferAssignment:
allocation 0: size 100, page 0, parameter 1, shape |f32[25]| at ShapeIndex {}, maybe-live-out:
 value: <1 param> (size=100,offset=0): f32[25]
allocation 1: size 50, page 0, parameter 0, shape |f32[5]| at ShapeIndex {}:
allocation 2: size 7, page 0, maybe-live-out:
allocation 3: size 1000, page 0, preallocated-temp:
allocation 4: size 9999, color 1, page 0, preallocated-temp:
"""
    found = buffers(text)
    assert found == {"arguments": 150, "outputs": 107, "aliased": 100, "temporaries": 1000}
    assert total(found) == 1157


@pytest.mark.parametrize(("name", "prefix", "tiles"), [("llava-1.6-7b", 3072, 5), ("llava-1.5-7b", 704, 1)])
def test_longest_prompt(name, prefix, tiles):
    """576 + 48 x 49 embeddings and 128 tokens of text; 576 and 128."""
    planned = sizes(Config(), PRESETS[name])
    assert (planned.shape.prefix, planned.shape.response, planned.shape.tiles) == (prefix, 256, tiles)
    assert sizes(Config(), PRESETS[name], prefix=100, response=10).shape.prefix == 128


def test_meshes_of_a_slice_divide_batch_and_heads():
    found = meshes(Config(batch_size=32), PRESETS["llava-1.6-34b"], WHERE)  # 56 heads
    assert MeshConfig(1, 16, 1) in found and MeshConfig(1, 2, 8) in found
    assert all(m.data * m.fsdp * m.tensor == 16 for m in found)
    assert all(m.tensor > 1 for m in meshes(Config(batch_size=8), PRESETS["llava-1.6-7b"], WHERE))


def test_configs_travel_to_another_process():
    for config in (Config(), Config(lora=None), Config(lora=LoraConfig(rank=8)), BDHSConfig()):
        assert pickle.loads(pickle.dumps(config)) == config


def test_unusable_wishes(monkeypatch):
    with pytest.raises(InputError, match="a BDHSConfig has no program 'train'"):
        plan(BDHSConfig(), programs=["train"])
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
        plan(Config(), where="v5e:4x4")


def test_a_splash_kernel_counts_the_blocks_that_it_visits():
    """The lower triangle of 4 x 4 blocks: 10 of 16. A row alone has no axis of its own."""
    planned, call = sizes(Config(), PRESETS["llava-1.6-7b"]), "s8[1,4,4]{2,1,0}, s8[1,4,4]{2,1,0}"
    for batch, rows in (("", 1), ("2,", 2)):
        shapes = ", ".join(f"bf16[{batch}32,3072,128]{{2,1,0}}" for _ in range(3))
        kernel = Instruction(
            "splash_mha_fwd_segmented.1",
            "custom-call",
            "()",
            (),
            f", operand_layout_constraints={{{call}, {shapes}}}",
        )
        expected = rows * 2 * 2 * 32 * 3072**2 * 128 * 10 / 16
        assert splash_flops(kernel, planned, "prefill") == expected


def who_sees_whom(prefix, responses, length, asking):
    """[queries, keys] by the definition: a prompt group's rows see what stands before them, but not what
    other responses say."""
    own = np.repeat(np.arange(responses + 1), [prefix] + [length] * responses)
    at = np.arange(len(own))
    sees = (at[None] <= at[:, None]) & ((own[None] == 0) | (own[None] == own[:, None]))
    return sees[prefix - asking :]


def visited(prefix, responses, length, asking, queries, keys):
    """Share of the blocks, after padding, in which some query sees some key. Padded queries stand at the
    last place."""
    sees = who_sees_whom(prefix, responses, length, asking)
    sees = np.pad(sees, ((0, queries - len(sees)), (0, 0)), mode="edge")
    sees = np.pad(sees, ((0, 0), (0, keys - sees.shape[1])))
    of_q, of_k = _blocks(queries)[0], _blocks(keys)[0]
    return float(sees.reshape(queries // of_q, of_q, keys // of_k, of_k).any((1, 3)).mean())


OF_RESPONSES = {1: SFT(), 2: DPO(), 3: Averaged()}


def planned_for(responses):
    online = Distorted() if responses == 3 else None
    return Config(objective=OF_RESPONSES[responses], online=online)


@pytest.mark.parametrize("program", ["train", "reference"])
@pytest.mark.parametrize("responses", [1, 2, 3])
@pytest.mark.parametrize("prefix, response", [(3072, 256), (600, 512), (256, 128)])
def test_a_splash_kernel_counts_the_responses_that_a_config_has(responses, program, prefix, response):
    """In the blocks of all rows, and in the last one, where the prefix asks with its last row alone."""
    planned = sizes(planned_for(responses), PRESETS["llava-1.6-7b"], prefix, response)
    prefix, response = planned.shape.prefix, planned.shape.response
    assert planned.responses == responses
    _, keys = _blocks(prefix + responses * response)
    for asking in (prefix, 1):
        _, queries = _blocks(asking + responses * response)
        if asking == 1 and queries == keys:
            continue  # shapes can't tell the two then
        shapes = ", ".join(f"bf16[2,32,{n},128]{{3,2,1,0}}" for n in (queries, keys, keys))
        given = f", operand_layout_constraints={{s8[1,4,4]{{2,1,0}}, {shapes}}}"
        kernel = Instruction("splash_mha_fwd_segmented.1", "custom-call", "()", (), given)
        share = visited(prefix, responses, response, asking, queries, keys)
        wanted = 2 * 2 * 2 * 32 * queries * keys * 128 * share
        assert splash_flops(kernel, planned, program) == pytest.approx(wanted)


# ---- compiles --------------------------------------------------------------------------------------


def small(**changes):
    base = PRESETS["llava-1.6-7b"]
    decoder = dataclasses.replace(
        base.decoder, vocab=1024, hidden=1024, mlp=2048, layers=3, heads=8, kv_heads=8
    )
    vision = dataclasses.replace(base.vision, layers=2)
    return dataclasses.replace(base, decoder=decoder, vision=vision, **changes)


@pytest.mark.slow
def test_on_the_devices_of_this_machine():
    tiny = dataclasses.replace(small(), pinpoints=())
    made = plan(
        Config(batch_size=8, mesh=MeshConfig(data=1, fsdp=-1)), tiny, programs=["train"], prefix=600
    )
    (train,) = made.programs
    assert made.chips == 8 and train.bound is None and train.fits
    assert 0.5 < train.model_flops / train.flops < 1.1
    assert {c["kind"] for c in train.collectives} & {"all-gather", "all-reduce"}


@pytest.mark.slow
def test_on_a_slice_that_is_not_there():
    """Both ways to read the memory agree; a program that is too large is a verdict."""
    pytest.importorskip("libtpu")
    config = Config(batch_size=16, mesh=MeshConfig(data=1, fsdp=-1))
    said = []
    made = plan(config, small(), "v5e:2x2", say=said.append)
    assert made.fits and [p.program for p in made.programs] == ["train", "prefill", "decode"]
    assert all(p.bound and p.rates and not p.notes for p in made.programs)
    assert said[0].endswith("5 tiles") and said[-1].startswith("fits")
    whole = plan(config, small(), "v5e:2x2", programs=["prefill"], whole=True).programs[0]
    early = made.programs[1]
    for kind in ("arguments", "temporaries"):
        assert whole.memory[kind] == pytest.approx(early.memory[kind], rel=0.01, abs=2**20)
    large = plan(dataclasses.replace(config, batch_size=512), small(), "v5e:1x1", programs=["train"])
    assert not large.fits and large.verdict.startswith("does not fit: train needs")


@pytest.mark.slow
def test_weak_scaling():
    """Four times the chips and the batch: each chip computes and sends as much as before."""
    pytest.importorskip("libtpu")

    def on(where: str, chips: int):
        config = Config(
            batch_size=2 * chips, data=DataConfig(multiple=128), mesh=MeshConfig(data=1, fsdp=-1)
        )
        return plan(config, "llava-1.6-7b", where, programs=["train"]).programs[0]

    few, many = on("v5e:4x4", 16), on("v5e:8x8", 64)
    assert many.flops == pytest.approx(few.flops, rel=0.02)
    sent = [sum(c["sent"] for c in p.collectives) for p in (few, many)]
    assert sent[1] == pytest.approx(sent[0], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("responses", [1, 2, 3])
def test_kernels_of_a_slice_visit_what_the_responses_leave_to_be_seen(responses, monkeypatch):
    """Every splash kernel of a compiled step is counted by the definition."""
    pytest.importorskip("libtpu")
    seen, count = [], compiling.splash_flops

    def counted(call, planned, program):
        seen.append((call, planned, count(call, planned, program)))
        return seen[-1][-1]

    monkeypatch.setattr(compiling, "splash_flops", counted)
    config = dataclasses.replace(planned_for(responses), batch_size=4, mesh=MeshConfig(data=1, fsdp=-1))
    made = plan(config, small(), "v5e:2x2", programs=["train"])
    assert made.fits and not made.programs[0].notes
    shape, shares = seen[0][1].shape, set()
    for call, _, flops in seen:
        name = call.name.split("_")
        shapes = call.rest.partition("operand_layout_constraints={")[2].partition("frontend_attributes")[0]
        (*batch, queries, size), (*_, keys, _), *_ = [
            a.dims for a in hlo.arrays(shapes) if a.dtype != "s8" and len(a.dims) > 2
        ]
        products = next(n for kind, n in compiling.PRODUCTS.items() if kind in name)
        share = flops / (2 * products * np.prod(batch) * queries * keys * size)
        if keys != _blocks(shape.prefix + responses * shape.response)[1]:
            assert share == 1.0  # the vision tower's
            continue
        asking = shape.prefix if queries == keys else 1
        wanted = visited(shape.prefix, responses, shape.response, asking, queries, keys)
        assert share == pytest.approx(wanted)
        shares.add((asking, share))
    assert len(shares) == 2, "all rows, and the last block's"
