"""What is read of a compiled program, and a compiler that refuses, fails or dies."""

import dataclasses
import pickle
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from small_model import planned_for, small

from mllm_align import BDHSConfig, Config, LoraConfig
from mllm_align.config import MeshConfig
from mllm_align.errors import InputError
from mllm_align.models.families.registry import presets
from mllm_align.ops.splash import _blocks
from mllm_align.plan import compiled as compiling
from mllm_align.plan import hlo
from mllm_align.plan.chips import topology
from mllm_align.plan.compiled import buffers, compile_program, splash_flops
from mllm_align.plan.hlo import Instruction
from mllm_align.plan.planner import plan
from mllm_align.plan.targets import sizes
from mllm_align.plan.worker import Job
from mllm_align.training.fitting import total

PRESETS = presets()

# ---- memory ------------------------------------------------------------------------------------------


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


# ---- the worker --------------------------------------------------------------------------------------

MODULE = """ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4] parameter(0)
  ROOT %c = f32[4,4] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
MEMORY = {"arguments": 64, "outputs": 64, "aliased": 0, "temporaries": 0, "code": 0}
PYTHON = sys.executable
ALLOCATIONS = "allocation 0: size 64, page 0, parameter 0, shape |f32[4,4]|:\n"


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """worker(body) stands for the process that compiles; its body finds `folder`, and dumps objects."""

    def stand_in(body):
        script = tmp_path / "worker"
        head = f"""#!{PYTHON}
import os, pickle, sys, time
from pathlib import Path
folder = Path(sys.argv[3]).parent

def dump(name, what):
    (folder / name).write_bytes(pickle.dumps(what))

"""
        script.write_text(head + body)
        script.chmod(0o755)
        monkeypatch.setattr(compiling.sys, "executable", str(script))

    return stand_in


def job(where=None):
    planned = SimpleNamespace(tokens=7)
    return Job("train", None, None, planned, where, compiling.Path())


WHERE = topology("v5e:1x1")
DONE = f"""
(folder / "module.txt").write_text({MODULE!r})
dump("metadata.pickle", {{"rows": 3}})
dump("result.pickle", {{"memory": {MEMORY!r}}})
"""


def test_memory_and_counts_of_what_was_compiled(worker):
    worker(DONE)
    found = compile_program(job(), 1, whole=False)
    assert (found.memory, found.metadata, found.refused) == (MEMORY, {"rows": 3}, None)
    assert found.counts.flops == 2 * 4**3


@pytest.mark.parametrize(
    "said, told",
    [
        ("F0102 11:22 file.cc:3] Check failed: a == b\nmore", "Check failed: a == b"),
        ("Traceback\n  line\nModuleNotFoundError: No module named 'x'", "No module named 'x'"),
        ("nothing of interest", "status 3 and no message"),
    ],
)
def test_a_worker_that_dies_is_one_line(worker, said, told):
    worker(f"sys.stderr.write({said!r}); sys.stderr.flush(); os._exit(3)")
    with pytest.raises(InputError) as error:
        compile_program(job(), 1, whole=False)
    assert str(error.value).startswith("the compiler of the train program ended: ")
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_worker_that_is_killed(worker):
    worker("import signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(InputError, match="ended: status -9 and no message"):
        compile_program(job(), 1, whole=False)


def test_an_error_of_the_worker_is_raised_here(worker):
    worker('dump("result.pickle", {"raised": ValueError("of the mesh")})')
    with pytest.raises(ValueError, match="of the mesh"):
        compile_program(job(), 1, whole=False)


def test_too_large_is_a_result_and_any_other_refusal_an_error(worker):
    refusal = "RESOURCE_EXHAUSTED: HLO temporaries (17.16G) exceeds\navailable HBM"
    worker(f'dump("metadata.pickle", {{"rows": 3}}); dump("result.pickle", {{"error": {refusal!r}}})')
    found = compile_program(job(), 1, whole=False)
    assert (found.memory, found.counts, found.metadata) == (None, None, {"rows": 3})
    assert found.refused == refusal.replace("\n", " ")
    worker('dump("result.pickle", {"error": "UNIMPLEMENTED: no such op"})')
    with pytest.raises(InputError, match="refuses the train program: UNIMPLEMENTED: no such op"):
        compile_program(job(), 1, whole=False)


def test_a_tpus_compiler_is_stopped_once_its_module_is_final(worker, monkeypatch):
    """Of several parts the largest is read; without a result, memory comes from the allocations."""
    monkeypatch.setattr(compiling, "find_spec", lambda name: True)
    worker(f"""
environment = {{name: os.environ.get(name) for name in ("XLA_FLAGS", "JAX_PLATFORMS")}}
dump("metadata.pickle", environment)
(folder / "z{compiling.FINAL}").write_text("ENTRY %small () -> f32[] {{\\n}}\\n")
(folder / "b{compiling.FINAL}").write_text({MODULE!r})
(folder / "b{compiling.BUFFERS}").write_text({ALLOCATIONS!r})
(folder / "b{compiling.LATER}").write_text("")
time.sleep(600)
""")
    began = time.monotonic()
    found = compile_program(job(WHERE), 1, whole=False)
    assert time.monotonic() - began < 60
    assert found.counts.flops == 2 * 4**3
    assert found.memory == {"arguments": 64, "outputs": 0, "aliased": 0, "temporaries": 0}
    assert found.metadata == {"XLA_FLAGS": None, "JAX_PLATFORMS": "cpu"}, (
        "flags are for this machine's devices"
    )


def test_without_the_compiler_of_tpus(monkeypatch):
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
        plan(Config(), where="v5e:4x4")


def test_configs_travel_to_another_process():
    for config in (Config(), Config(lora=None), Config(lora=LoraConfig(rank=8)), BDHSConfig()):
        assert pickle.loads(pickle.dumps(config)) == config


# ---- splash kernels ----------------------------------------------------------------------------------


def test_a_splash_kernel_counts_the_blocks_that_it_visits():
    """The lower triangle of 4 x 4 blocks: 10 of 16. A row alone has no axis of its own."""
    planned, call = sizes(Config(), presets()["llava-1.6-7b"]), "s8[1,4,4]{2,1,0}, s8[1,4,4]{2,1,0}"
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


@pytest.mark.parametrize("program", ["train", "reference"])
@pytest.mark.parametrize("responses", [1, 2, 3])
@pytest.mark.parametrize("prefix, response", [(3072, 256), (600, 512), (256, 128)])
def test_a_splash_kernel_counts_the_responses_that_a_config_has(responses, program, prefix, response):
    """In the blocks of all rows, and in the last one, where the prefix asks with its last row alone."""
    planned = sizes(planned_for(responses), presets()["llava-1.6-7b"], prefix, response)
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


def test_what_is_no_splash_kernel_is_not_counted():
    planned = sizes(Config(), presets()["llava-1.6-7b"])
    shapes = ", operand_layout_constraints={bf16[32,256,128]{2,1,0}, bf16[32,256,128]{2,1,0}}"
    assert splash_flops(Instruction("my_kernel", "custom-call", "()", (), shapes), planned, "train") is None
    assert (
        splash_flops(Instruction("splash_mha_fwd.1", "custom-call", "()", (), ""), planned, "train") is None
    )


@pytest.mark.slow
@pytest.mark.parametrize("responses", [1, 3])
def test_kernels_of_a_slice_visit_what_the_responses_leave_to_be_seen(responses, monkeypatch):
    """Every splash kernel of a compiled step is counted by the definition."""
    pytest.importorskip("libtpu")
    seen, count = [], compiling.splash_flops

    def counted(call, planned, program, block):
        seen.append((call, planned, count(call, planned, program, block)))
        return seen[-1][-1]

    monkeypatch.setattr(compiling, "splash_flops", counted)
    config = dataclasses.replace(planned_for(responses), batch_size=4, mesh=MeshConfig(data=1, fsdp=-1))
    made = plan(config, small(), "v5e:2x2", programs=["train"])
    (train,) = made.programs
    assert made.fits and train.bound and train.rates and not train.notes
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
