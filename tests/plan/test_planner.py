"""Plans of whole configs: which programs, what they make, sweeps over meshes."""

import dataclasses
import json

import pytest
from small_model import small

from mllm_align import MDPO, BDHSConfig, Config, DataConfig, SceneOracle
from mllm_align.config import MeshConfig, OnlinePairs
from mllm_align.errors import InputError
from mllm_align.models.families.registry import presets
from mllm_align.plan import planner
from mllm_align.plan.chips import GIB, topology
from mllm_align.plan.compiled import Compiled
from mllm_align.plan.counts import Counts
from mllm_align.plan.planner import meshes, plan, save, sweep
from mllm_align.training.fitting import LADDER
from mllm_align.training.flops import decoder_flops, vision_flops

PRESETS = presets()

WHERE = topology("v5e:4x4")


def test_meshes_of_a_slice_divide_batch_and_heads():
    found = meshes(Config(batch_size=32), presets()["llava-1.6-34b"], WHERE)  # 56 heads
    assert MeshConfig(1, 16, 1) in found and MeshConfig(1, 2, 8) in found
    assert all(m.data * m.fsdp * m.tensor == 16 for m in found)
    assert all(m.tensor > 1 for m in meshes(Config(batch_size=8), presets()["llava-1.6-7b"], WHERE))


def test_programs_that_a_config_does_not_have():
    with pytest.raises(InputError, match="a BDHSConfig has no program 'train'"):
        plan(BDHSConfig(), programs=["train"])
    with pytest.raises(InputError, match="a Config has no program 'judge'; take some of train, reference"):
        plan(Config(), programs=["judge"])


# ---- with a compiler of our own ------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled. Programs need 1 GiB and a second of computing on each of 16 chips."""
    jobs = []

    def compile_program(job, devices, whole):
        jobs.append(job)
        mesh = job.config.mesh
        cut = {"slice": 1, "data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
        facts = {"rows": 32, "devices": 16, "device": "TPU v5 lite", "mesh": cut, "kept_whole": ["norm"]}
        memory = {"arguments": GIB, "outputs": 0, "aliased": 0, "temporaries": 0}
        flops = 197e12 / mesh.tensor  # the meshes come in the other order
        return Compiled(memory, None, Counts(flops=flops), facts, 1.0)

    monkeypatch.setattr(planner, "compile_program", compile_program)
    return jobs


def test_what_a_run_of_each_program_makes(compiled):
    config = Config(batch_size=32, online=OnlinePairs(annotator=SceneOracle(), samples=4))
    said = []
    made = plan(config, "llava-1.5-7b", "v5e:4x4", prefix=600, response=100, say=said.append)
    rates = {p.program: p.rates for p in made.programs}
    assert rates == {
        "train": {"pairs/s": 32, "tokens/s": 32 * (608 + 2 * 128)},
        "features": {"tiles/s": 32},
        "prefill": {"prompts/s": 32, "tokens/s": 32 * 608},
        "decode": {"responses/s": 128, "tokens/s": 128 * 256},
    }
    assert [job.program for job in compiled] == list(rates)
    assert (made.chips, made.vendor_name, made.model) == (16, "v5litepod-16", "llava-1.5-7b")
    assert made.kept_whole == ["norm"] and made.fits
    assert (
        len(said) == 1 + 1 + 4
        and said[0] == made.verdict
        and said[1].startswith("llava-1.5-7b on v5e:4x4")
        and said[2].startswith("train: ")
    )


def test_model_flops_of_each_program(compiled):
    """Of 2 rows a chip: a step with LoRA and a live reference is three passes of all but the tower."""
    model = presets()["llava-1.5-7b"]
    config = Config(batch_size=32, online=OnlinePairs(annotator=SceneOracle(), samples=4))
    made = plan(config, model, "v5e:4x4", prefix=608, response=128)
    found = {p.program: p.model_flops for p in made.programs}
    vision = vision_flops(model, 1)
    seen = 608**2 / 2 + 2 * (128 * 608 + 128**2 / 2)
    rest = decoder_flops(model, 1, 608 + 2 * 128, seen, 1 + 2 * 127)
    decode = 4 * decoder_flops(model, 0, 256, 256 * (608 + 128), 256)
    prefill = decoder_flops(model, 1, 608, 608**2 / 2, 0)
    wanted = {"train": vision + 3 * rest, "features": vision, "prefill": prefill, "decode": decode}
    assert found == pytest.approx({name: 2 * flops for name, flops in wanted.items()})


def test_model_flops_and_tokens_of_a_second_prefix(compiled):
    """Of the same length, continued by one response."""
    model = presets()["llava-1.5-7b"]
    made = plan(Config(batch_size=32, objective=MDPO()), model, "v5e:4x4", prefix=608, response=128)
    (found,) = made.programs
    flops = 2 * vision_flops(model, 1)
    for answers in (2, 1):
        seen = 608**2 / 2 + answers * (128 * 608 + 128**2 / 2)
        flops += 3 * decoder_flops(model, 1, 608 + answers * 128, seen, 1 + answers * 127)
    assert found.model_flops == pytest.approx(2 * flops)
    assert found.rates == {"pairs/s": 32, "tokens/s": 32 * (2 * 608 + 3 * 128)}


@pytest.fixture
def by_remat(monkeypatch):
    """What was compiled: steps of these GiB. Of 15.75 a run takes up to 14.96."""
    sizes, tried = {"dots": None, "gate": 15.2, "qkv": 14.9, "attention": 12, "full": 9, "none": 1}, []

    def compile_program(job, devices, whole):
        facts = {"rows": 32, "devices": 16, "device": "TPU v5 lite", "mesh": {"data": 16}, "kept_whole": []}
        tried.append((job.program, job.config.remat))
        size = sizes[job.config.remat] if job.program == "train" else 1
        if size is None:
            return Compiled(None, "RESOURCE_EXHAUSTED: no", None, facts, 1.0)
        memory = {"arguments": int(size * GIB), "outputs": 0, "aliased": 0, "temporaries": 0}
        return Compiled(memory, None, Counts(flops=197e12 * (1 + 1 / size)), facts, 1.0)

    monkeypatch.setattr(planner, "compile_program", compile_program)
    return tried


def test_auto_plans_every_rematerialisation_and_takes_what_a_run_takes(by_remat):
    said = []
    config = Config(batch_size=32, remat="auto", reference="stored")
    made = plan(config, "llava-1.5-7b", "v5e:4x4", say=said.append)
    assert by_remat == [("train", each) for each in LADDER] + [("reference", "qkv")]
    assert made.remat == "qkv" and made.programs[0] is made.policies["qkv"] and made.fits
    assert made.verdict.startswith("fits: train needs 14.90 of 15.75")
    assert said[2].splitlines() == [
        "remat auto: qkv",
        "  dots          does not fit: RESOURCE_EXHAUSTED: no",
        "  gate          15.20 of 15.75 GiB, 210 TFLOP a chip, bound 1.066 s",
        "  qkv           14.90 of 15.75 GiB, 210 TFLOP a chip, bound 1.067 s",
        "  attention     12.00 of 15.75 GiB, 213 TFLOP a chip, bound 1.083 s",
        "  full          9.00 of 15.75 GiB, 219 TFLOP a chip, bound 1.111 s",
    ]


def test_auto_keeps_all_where_devices_tell_no_limit(by_remat):
    made = plan(Config(batch_size=32, remat="auto"), "llava-1.5-7b")
    assert (made.remat, by_remat) == ("none", [("train", "none")])


def test_a_sweep_sorts_meshes_by_their_bound(compiled):
    said = []
    config = Config(batch_size=32)
    found = sweep(config, "llava-1.6-7b", "v5e:4x4", say=said.append)
    tensors = [p.mesh["tensor"] for p in found]
    assert tensors == sorted(tensors, reverse=True) and len(set(tensors)) > 1
    assert [p.programs[0].bound for p in found] == [1 / tensor for tensor in tensors]
    assert len(found) == len(said) == len(meshes(config, presets()["llava-1.6-7b"], WHERE))
    assert said[0].startswith(f"[1/{len(said)}] data 1 x fsdp 16 x tensor 1: bound 1 s by compute, fits")
    assert {job.program for job in compiled} == {"train"}


def test_a_sweep_goes_on_past_what_the_compiler_refuses(compiled, monkeypatch):
    made = planner.compile_program

    def refusing(job, devices, whole):
        if job.config.mesh.tensor == 1:
            raise InputError("the compiler refuses")
        return made(job, devices, whole)

    monkeypatch.setattr(planner, "compile_program", refusing)
    said = []
    found = sweep(Config(batch_size=32), "llava-1.6-7b", "v5e:4x4", say=said.append)
    assert found and all(p.mesh["tensor"] > 1 for p in found)
    assert said[0].endswith("tensor 1: the compiler refuses")


def test_no_mesh_divides_an_odd_batch():
    with pytest.raises(InputError, match="no mesh of v5e:4x4 divides batch_size"):
        sweep(Config(batch_size=1), "llava-1.6-7b", "v5e:4x4")


def test_plans_are_saved_as_json(compiled, tmp_path):
    made = plan(Config(batch_size=32), "llava-1.5-7b", "v5e:4x4", programs=["train"])
    save(made, tmp_path / "one.json")
    save([made, made], tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two == [one, one] and one["fits"] is True
    assert one["programs"][0]["parts"]["compute"] == 1.0 and one["shape"]["prefix"] == 704


# ---- with the compilers ----------------------------------------------------------------------------------


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
    """Both ways to read the memory agree; a program that is too large is a verdict. Train steps that fit
    are compiled below, and in `test_compiled`."""
    pytest.importorskip("libtpu")
    config = Config(batch_size=16, mesh=MeshConfig(data=1, fsdp=-1))
    said = []
    programs = ["features", "prefill", "decode"]
    made = plan(config, small(), "v5e:2x2", programs=programs, say=said.append)
    assert made.fits and [p.program for p in made.programs] == programs
    assert all(p.bound and p.rates and not p.notes for p in made.programs)
    assert said[0].startswith("fits") and said[1].endswith("5 tiles")
    # the tower's machine code is made in a third of the time that the prefill's takes
    whole = plan(config, small(), "v5e:2x2", programs=["features"], whole=True).programs[0]
    early = made.programs[0]
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
