"""The check for GPUs: its pieces, and all of it in small on a CPU."""

import importlib.metadata as metadata
import io
import json
import math
import os
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.profiler import ProfileData
from packaging.requirements import Requirement
from xla_flags import FAST

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_check import attention, differ, model, needs, profile, resume
from gpu_check.lines import LeftOut, Lines, check
from gpu_check.parts import DEVICES, PARTS, Budget, Part, environment, run_all, run_part, summary

from mllm_align.ops import cudnn
from mllm_align.training.flops import PEAK

ROOT = Path(__file__).resolve().parents[2]

# ---- what is lacking ---------------------------------------------------------------------------------


def test_requirements_are_the_projects_own():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [str(r) for r in needs.requirements()] == [str(Requirement(line)) for line in listed]
    assert set(needs.UNUSED) < {r.name for r in needs.requirements()}


@pytest.fixture
def installed(monkeypatch):
    """A machine with these packages, and what each of them asks for."""
    there = {
        "jax": ("0.11.2", ["numpy>=2", 'kubernetes; extra == "k8s"']),
        "numpy": ("2.5.0", None),
        "grain": ("0.2.18", ["array-record", 'old; python_version < "3"']),
        "etils": ("1.15", ['zipp; extra == "epath"']),
        "transformers": ("5.17.0", []),
    }

    def version(name):
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name][0]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: there[name][1])


def test_lacking(installed):
    wanted = [
        *map(Requirement, ["jax>=0.10,<0.12", "grain", "etils[epath]", "transformers>=5.23,<6", "tyro>=1"])
    ]
    found = needs.lacking(wanted)
    assert [(x["name"], x["found"]) for x in found] == [
        ("transformers", "5.17.0"),  # of another version
        ("tyro", None),
        ("array-record", None),  # of one that is there
        ("zipp", None),  # of an extra that is asked for
    ]
    words = needs.command(found)
    assert words.startswith("python3 -m pip download --only-binary=:all: --python-version 3.")
    assert "'transformers<6,>=5.23'" in words and "array-record" in words and "tyro" not in words
    assert needs.command([x for x in found if x["name"] == "tyro"]) is None


def test_nothing_is_lacking(installed):
    assert needs.lacking([Requirement("jax"), Requirement("numpy>=2.2,<3")]) == []


def test_most_parts_need_nothing_carried():
    """What accelerators' images commonly lack is wanted by the part that resumes runs alone."""
    lacking = ["grain", "array_record", "sentencex", "httpx2", "tyro", "tensorflow_datasets"]
    parts = [f"gpu_check.{part.name}" for part in PARTS if part.name != "resume"]
    code = f"import sys; sys.modules |= dict.fromkeys({lacking}); import {', '.join(parts)}"
    paths = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=True)


# ---- lines -------------------------------------------------------------------------------------------


@pytest.fixture
def lines():
    """Lines of a part with a minute, and what they said so far."""
    made = Lines("some", 60, io.StringIO())
    made.said = lambda: [json.loads(line) for line in made.out.getvalue().splitlines()]
    return made


@pytest.mark.slow
def test_it_goes_on_after_a_failure(lines):
    def fails():
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwith details")

    def lacks():
        raise ModuleNotFoundError("No module named 'grain'", name="grain.python")

    def is_broken():
        raise ModuleNotFoundError("No module named 'mllm_align.x'", name="mllm_align.x")

    def is_left_out():
        raise LeftOut("no NVIDIA device")

    makers = {"a": fails, "b": lacks, "c": is_broken, "d": is_left_out, "e": lambda: {"value": 1.5}}
    passed = [lines(name, make) for name, make in makers.items()]
    assert passed == [False, False, False, False, True]
    failed, lacking, broken, left_out, good = lines.said()
    assert failed["status"] == "failed"
    assert failed["reason"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert failed["traceback"][-1] == "with details" and any("fails" in x for x in failed["traceback"])
    assert (lacking["status"], lacking["reason"]) == (
        "left out",
        "needs grain.python, which is not installed",
    )
    assert broken["status"] == "failed"
    assert (left_out["status"], left_out["reason"]) == ("left out", "no NVIDIA device")
    assert (good["part"], good["item"], good["status"], good["value"]) == ("some", "e", "ok", 1.5)


@pytest.mark.parametrize("found", [2.0, math.nan, math.inf])
def test_out_of_bounds_fails(lines, found):
    assert not lines("x", lambda: {"checks": {"near": check(0.5, 1), "far": check(found, 1)}})
    (line,) = lines.said()
    assert (line["status"], line["reason"]) == ("failed", "out of bounds: far")
    assert line["checks"]["near"] == {"found": 0.5, "bound": 1.0}
    assert lines("y", lambda: {"checks": {"exact": check(0, 0)}})


def test_what_does_not_fit_is_left_out(lines):
    assert not lines("long", lambda: pytest.fail("was begun"), needs=100)
    assert lines.said()[0]["reason"].startswith("takes about 100 s; ")


# ---- parts -------------------------------------------------------------------------------------------


def test_shares_are_of_the_whole():
    assert sum(part.share for part in PARTS) == pytest.approx(1)


def test_a_part_gets_its_share_and_what_is_spare():
    parts = Part("a", 0.5), Part("b", 0.3), Part("c", 0.2)
    budget = Budget(100, parts)
    assert budget.of(parts[0]) == pytest.approx(50, abs=1)
    budget.began -= 10  # a took 10 s
    assert budget.of(parts[1]) == pytest.approx(70, abs=1)
    budget.began -= 82
    assert budget.of(parts[2]) == 0  # 8 s are left
    assert Budget(8, parts).of(parts[0]) == pytest.approx(4, abs=1)  # a short check is short by wish


def child(text, *, then=""):
    return [sys.executable, "-c", f"print({text!r}, flush=True); {then}"]


LINE = json.dumps({"part": "a", "item": "x", "status": "ok"})


def test_lines_are_handed_on(tmp_path):
    said = []
    run_part(Part("a", 1), child(f"noise\n{LINE}\n[1]\n{{}}"), 60, said.append, tmp_path)
    assert said == [json.loads(LINE)]


@pytest.mark.parametrize(
    ("then", "seconds", "reason"),
    [
        ("import sys; sys.exit('what was wrong')", 60, "its process ended with status 1"),
        ("import os; os.kill(os.getpid(), 11)", 60, "its process ended by signal 11"),
        ("import time; time.sleep(60)", 1, "its process stopped: its 1 s were over"),
    ],
)
def test_a_process_that_ends_badly(tmp_path, then, seconds, reason):
    said = []
    run_part(Part("a", 1), child(LINE, then=then), seconds, said.append, tmp_path)
    assert said[0] == json.loads(LINE)
    assert (said[1]["item"], said[1]["status"], said[1]["reason"]) == ("part", "failed", reason)
    assert said[1]["traceback"] == (["what was wrong"] if "sys" in then else [])


def test_all_parts_are_tried_and_told(tmp_path):
    parts = Part("a", 0.4), Part("b", 0.3), Part("c", 0.3)
    thens = {"a": "import os; os.abort()", "b": "", "c": ""}

    def command(part, seconds):
        return child(LINE.replace('"a"', f'"{part.name}"'), then=thens[part.name])

    lines = run_all(command, Budget(60, parts), lambda line: None, tmp_path)
    assert [(x["part"], x["status"]) for x in lines] == [
        ("a", "ok"),
        ("a", "failed"),
        ("b", "ok"),
        ("c", "ok"),
    ]
    last = summary(lines, ["grain"], 1.0)
    assert (last["status"], last["passed"], last["failed"]) == ("failed", 3, ["a: part"])
    assert (last["left_out"], last["lacking"]) == ([], ["grain"])
    assert summary(lines[2:], [], 1.0)["status"] == "ok"


def test_nothing_is_run_without_a_device_or_time(tmp_path):
    parts = Part("device", 0.5), Part("train", 0.5)
    line = json.dumps({"part": "device", "item": DEVICES, "status": "failed"})
    lines = run_all(lambda part, _: child(line), Budget(60, parts), lambda line: None, tmp_path)
    assert [(x["part"], x["status"]) for x in lines] == [("device", "failed"), ("train", "left out")]
    budget = Budget(60, parts)
    budget.began -= 60
    lines = run_all(lambda part, _: pytest.fail("was begun"), budget, lambda line: None, tmp_path)
    assert [x["reason"] for x in lines] == ["0 s are left of 60 s"] * 2


def test_a_parts_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere/warm")
    env = environment(next(part for part in PARTS if part.name == "resume"), tmp_path)
    assert env["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_deterministic_ops=true"
    assert env["JAX_PLATFORMS"] == "cuda,cpu"
    assert env["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    assert env["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(ROOT / "benchmarks")]


def test_figures_of_the_devices_that_it_is_for():
    """https://www.nvidia.com/en-us/data-center/h100/ and /h200/: half of the figure with sparsity."""
    assert PEAK["NVIDIA H100 80GB HBM3"] == PEAK["NVIDIA H200"] == pytest.approx(1979e12 / 2, rel=1e-3)


# ---- distances, resumed runs, models -----------------------------------------------------------------


def test_distances():
    found, expected = {"a": np.array([3.0, 4.0]), "b": 1.0}, {"a": np.array([3.0, 2.0]), "b": 1.0}
    assert differ.largest(found, expected) == 2
    assert differ.root_mean_square(found, expected) == pytest.approx(2 / math.sqrt(3))
    assert differ.relative(found, expected) == pytest.approx(2 / math.sqrt(14))
    assert math.isnan(differ.largest({"a": np.array([math.nan])}, {"a": np.zeros(1)}))


def test_resumed_parameters_are_compared_bit_by_bit(tmp_path):
    def save(name, *values):
        np.savez(tmp_path / f"{name}-float32.npz", x=np.array(values, np.float32))

    save("start", 0.5, 1.0)
    save("whole", 0.0, 1.0)
    save("resumed", 0.0, 1.0)
    found = resume.compared(tmp_path, "float32")
    assert (found["parameters"], found["moved"]) == (2, 1)
    assert found["checks"]["parameters_that_differ"] == check(0, 0)
    save("resumed", -0.0, np.nextafter(np.float32(1), np.float32(2)))
    assert resume.compared(tmp_path, "float32")["checks"]["parameters_that_differ"]["found"] == 2
    save("start", 0.0, 1.0)
    with pytest.raises(RuntimeError, match="nothing was trained"):
        resume.compared(tmp_path, "float32")


def test_random_weights():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        "kernel": jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=one),
        "layers": jax.ShapeDtypeStruct((3, 64, 64), jnp.bfloat16, sharding=one),
        "scale": jax.ShapeDtypeStruct((64,), jnp.bfloat16, sharding=one),
    }
    made = model.random_weights(shapes)
    for name in ("kernel", "layers"):
        values = np.asarray(made[name], np.float32)
        assert made[name].dtype == jnp.bfloat16 and values.std() == pytest.approx(0.02, rel=0.05)
    assert not (np.asarray(made["layers"][0]) == np.asarray(made["layers"][1])).all()
    assert (np.asarray(made["scale"], np.float32) == 1).all()


def test_a_peak_is_told_only_by_what_raised_it(monkeypatch):
    stats = {"bytes_in_use": 3, "peak_bytes_in_use": 9}
    device = SimpleNamespace(memory_stats=lambda: dict(stats))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    before = model.memory()
    assert before == {"bytes_in_use": 3, "peak_bytes": 9}
    assert model.memory(before) == {"bytes_in_use": 3, "peak_bytes": None, "peak_bytes_below": 9}
    stats["peak_bytes_in_use"] = 12
    assert model.memory(before) == {"bytes_in_use": 3, "peak_bytes": 12}


@pytest.mark.parametrize("chosen", [model.TINY, model.LLAVA_7B], ids=["tiny", "7b"])
def test_prompts_hold_a_whole_image(chosen):
    tiles, tokens, image = model.prompt(chosen.model, chosen.prefix, np.random.default_rng(0))
    side, v = 2 * chosen.model.vision.side, chosen.model.vision
    assert tiles == 5 and len(tokens) == len(image) == chosen.prefix
    assert (image >= 0).sum() == v.tokens + side * (side + 1)  # a newline ends each line
    assert image.max() == 5 * v.tokens  # the table's last row
    assert (
        (tokens == chosen.model.image_token) == (image >= 0)
    ).all() and tokens.max() < chosen.model.decoder.vocab


@pytest.mark.parametrize("case", attention.LARGE + attention.SMALL, ids=lambda case: case.name)
def test_jax_takes_the_kernels_cases_for_cuda(monkeypatch, case):
    """No GPU is needed to write the program down."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    total = case.prefix + case.responses * case.length
    asking = total - (case.prefix - 1 if case.last else 0)
    visible = jnp.ones((case.rows, total), bool)

    def both(q, k, v, cotangent):
        attend = partial(cudnn.prompt_group_attention, visible=visible, prefix=case.prefix)
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, responses=case.responses), q, k, v)
        return (out, *pull(cotangent))

    q = jax.ShapeDtypeStruct((case.rows, asking, case.heads, case.size), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((case.rows, total, case.groups, case.size), jnp.bfloat16)
    text = jax.jit(both).trace(q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
    calls = (not case.last) + (case.responses > 0)
    assert text.count("Backward(") == calls and text.count("@__cudnn$") == 2 * calls


# ---- the profile -------------------------------------------------------------------------------------


def trace(plane, lines):
    """lines: name -> events (name, start, nanoseconds, operation of the program or None)."""
    names = sorted({name for events in lines.values() for name, *_ in events})
    text = f'name: "{plane}" stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}\n'
    for i, name in enumerate(names):
        text += f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n'
    for name, events in lines.items():
        body = ""
        for event, start, length, operation in events:
            stat = "" if operation is None else f'stats {{ metadata_id: 1 str_value: "{operation}" }}'
            body += f"events {{ metadata_id: {names.index(event)} offset_ps: {start}000 "
            body += f"duration_ps: {length}000 {stat} }}\n"
        text += f'lines {{ name: "{name}" {body} }}\n'
    return f"planes {{ {text} }}\n"


def read_trace(*planes):
    text = "".join(trace(*plane) for plane in planes)
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


def test_dearest_of_a_gpu():
    """Streams count; what groups them again, and the host, do not."""
    device = {
        "Stream #7(Compute)": [
            ("gemm", 0, 6000, "fusion.1"),
            ("gemm", 7000, 2000, "fusion.1"),
            ("gemm", 9000, 1000, "fusion.2"),
        ],
        "Stream #8(MemcpyD2D)": [("MemcpyD2D", 0, 3000, None)],
        "XLA Modules": [("jit_step", 0, 50000, "jit_step")],
        "Framework Ops": [("dot", 0, 50000, "dot")],
    }
    host = {"python": [("call", 0, 90000, "fusion.9")]}
    found = profile.dearest(read_trace(("/host:CPU", host), ("/device:GPU:0", device)), steps=2)
    assert (found["operations"], found["operations_us"]) == (3, 6.0)
    assert found["kinds_us"] == {"attention": 0.0, "products": 4.5, "copies": 1.5, "rest": 0.0}
    assert [(x["operation"], x["kernel"], x["us"]) for x in found["dearest"]] == [
        ("fusion.1", "gemm", 4.0),
        ("MemcpyD2D", "MemcpyD2D", 1.5),
        ("fusion.2", "gemm", 0.5),
    ]
    assert [x["calls"] for x in found["dearest"]] == [1.0, 0.5, 0.5]
    assert sum(x["share"] for x in found["dearest"]) == pytest.approx(1)


def test_dearest_of_a_cpu():
    """A loop's time is what its body leaves of it; events of the host that are no operation don't count."""
    threads = {
        "one": [
            ("while", 0, 10000, "while"),
            ("dot", 1000, 4000, "dot"),
            ("dot", 5000, 3000, "dot"),
            ("add", 10000, 1000, "add"),
            ("wait", 0, 90000, None),
        ],
        "two": [("add", 2000, 500, "add")],
    }
    found = profile.dearest(read_trace(("/host:CPU", threads)), steps=1, count=2)
    assert [(x["operation"], x["us"]) for x in found["dearest"]] == [("dot", 7.0), ("while", 3.0)]
    assert found["operations_us"] == 11.5
    with pytest.raises(RuntimeError, match="no operation"):
        profile.dearest(read_trace(("/host:CPU", {"one": [("wait", 0, 9, None)]})), steps=1)


# ---- all of it, in small -----------------------------------------------------------------------------

ITEMS = {
    "device": ["devices", "peak"],
    "parity": ["scores and step, float32", "scores and step, bfloat16"],
    "attention": [
        "cudnn",
        "xla: 2 key heads of 16, 2 responses, padded",
        "xla: 1 key head of 8, 3 responses, a row unseen",
        "xla: last block, 1 response",
        "xla: prefill alone",
        "xla: tower, (2, 17, 2, 8)",
    ],
    "resume": ["runs", "trained parameters, float32"],
    "train": [
        "weights",
        "LoRA DPO step, 2 pairs of 48 + 8 tokens, remat full",
    ],
    "generation": [
        "weights",
        "tower",
        "BDHS",
        "rollout, 2 samples of 8 tokens",
    ],
    "profile": ["weights", "train step, 2 pairs, remat full", "rollout, 2 samples of 8 tokens"],
}


def speeds(value):
    """All numbers under names that speak of seconds, rates or FLOPs."""
    for name, each in value.items():
        if name.endswith(("_s", "_per_s")):
            yield from each.values() if isinstance(each, dict) else [each]


@pytest.mark.slow
def test_tiny_runs_all_of_it(tmp_path):
    """Without the packages that it says it does not need."""
    for name in needs.UNUSED:
        (tmp_path / f"{name.replace('-', '_')}.py").write_text("raise ImportError('is not needed')\n")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST, "PYTHONPATH": str(tmp_path)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # parts share the small programs, too
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--minutes", "20"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [line for line in lines if line["status"] == "failed"] or done.stderr
    first, *middle, last = lines
    assert (first["part"], first["lacking"], first["fetch"]) == ("needs", [], None)
    items = {name: [*own, "part"] for name, own in ITEMS.items()}
    assert [(x["part"], x["item"]) for x in middle] == [(p, i) for p, own in items.items() for i in own]
    assert (last["part"], last["failed"], last["left_out"]) == ("summary", [], ["attention: cudnn"])
    assert {x["item"]: x["reason"] for x in middle if x["status"] != "ok"} == {"cudnn": "no NVIDIA device"}

    checks = {(x["part"], name): c for x in middle for name, c in x.get("checks", {}).items()}
    assert all(0 <= c["found"] <= c["bound"] < math.inf for c in checks.values())
    kinds = {
        ("parity", "update_relative"),
        ("attention", "k_relative"),
        ("resume", "parameters_that_differ"),
    }
    assert kinds < checks.keys()
    assert checks["parity", "logp_rms_nats"]["bound"] > 0  # bfloat16 differs from float32
    assert checks["resume", "parameters_that_differ"] == {"found": 0.0, "bound": 0.0}

    of_speed = [
        x for x in middle if x["part"] in ("train", "generation") and x["item"] not in ("weights", "part")
    ]
    for line in of_speed:
        numbers = [*speeds(line)]
        assert len(numbers) > 3 and all(0 < n < math.inf for n in numbers), line
    (step,) = (x for x in middle if x["part"] == "train" and "step_s" in x)
    assert 0 < step["loss"] < 1 and step["planned_bytes"] > 0

    traced = [x["dearest"] for x in middle if "dearest" in x]
    assert [len(dearest) for dearest in traced] == [10, 10]
    for dearest in traced:
        times = [x["us"] for x in dearest]
        assert times == sorted(times, reverse=True) and min(times) > 0
        assert all(0 < x["share"] <= 1 for x in dearest)
        assert sum(x["share"] for x in dearest) <= 1
