"""Which rematerialisation `remat auto` takes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mllm_align.batch import Shape
from mllm_align.config import Config, MeshConfig
from mllm_align.models.families.registry import presets
from mllm_align.sharding import make_mesh, replicated
from mllm_align.training import fitting
from mllm_align.training.fitting import LADDER, bytes_of, fastest, fitting_remat, free, memory, needs, total

SHAPE = Shape(64, 32, 1)
SIZES = dict(zip(LADDER, (900, 700, 500, 300, 100), strict=True))


@pytest.mark.parametrize("first", range(len(LADDER)))
def test_the_first_that_fits_is_found_in_three_programs_at_most(first):
    tried = []

    def fits(policy):
        tried.append(policy)
        return LADDER.index(policy) >= first

    assert fastest(fits) == LADDER[first]
    assert len(tried) == len(set(tried)) <= 3 and "full" not in tried


def test_full_is_taken_where_nothing_fits():
    assert fastest(lambda policy: False) == "full"


# ---- bytes -------------------------------------------------------------------------------------------


def test_memory_of_a_program():
    """A [64, 32] and a [32, 16] in, a [64, 16] out, in float32."""
    program = jax.jit(lambda a, b: a @ b)
    found = memory(program.lower(jnp.zeros((64, 32)), jnp.zeros((32, 16))).compile())
    assert (found["arguments"], found["outputs"], found["aliased"]) == (4 * (2048 + 512), 4 * 1024, 0)
    donated = jax.jit(lambda a: a + 1, donate_argnums=0).lower(jnp.zeros((64, 32))).compile()
    assert memory(donated)["aliased"] == 4 * 2048


def test_what_is_passed_on_in_place_counts_once():
    found = {"arguments": 100, "outputs": 80, "aliased": 70, "temporaries": 5}
    assert total(found) == 115 and total(found | {"code": 3}) == 118


def device(**stats):
    return SimpleNamespace(memory_stats=lambda: stats or None)


def test_arguments_that_are_there_already_are_no_loss():
    """Of 100 bytes 40 are in use, 30 of them by the step's own arguments: 90 are the step's."""
    fuller = device(bytes_limit=100, bytes_in_use=40)
    assert free([device(bytes_limit=100, bytes_in_use=30), fuller], 30) == 90
    assert free([fuller, device()], 0) is None


def test_bytes_of_a_device_alone_count():
    mesh = make_mesh(MeshConfig(data=8), jax.devices())
    cut = jax.device_put(jnp.zeros((16, 4)), jax.NamedSharding(mesh, jax.P("data")))
    whole = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=replicated(mesh))
    assert bytes_of({"cut": cut, "whole": whole, "none": None}) == 4 * 8 + 6


class Compiler:
    """Stands in for a step, and for its compiled program."""

    def __init__(self, refusal=None):
        self.refusal, self.step, self.state, self.base = refusal, self, None, None
        sizes = {"argument": 100, "output": 80, "alias": 70, "temp": 5, "generated_code": 1}
        self.found = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})

    def lower(self, *_):
        return self

    def compile(self):
        if self.refusal:
            raise jax.errors.JaxRuntimeError(self.refusal)
        return SimpleNamespace(memory_analysis=lambda: self.found)


def test_a_compiler_that_finds_too_little_memory_is_no_error():
    assert needs(Compiler(), None) == 116
    assert needs(Compiler("RESOURCE_EXHAUSTED: 20G of 16G"), None) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        needs(Compiler("INTERNAL: no"), None)


# ---- the choice --------------------------------------------------------------------------------------


@pytest.fixture
def choice(monkeypatch):
    """choice(limit, saved) -> Fit on a device with so many bytes; `tried` are the policies compiled."""
    model, mesh = presets()["llava-1.5-7b"], make_mesh(MeshConfig(), jax.devices()[:1])
    tried = []

    def needs(program, batch):
        tried.append(program.remat)
        return SIZES[program.remat]

    monkeypatch.setattr(fitting, "needs", needs)

    def choice(limit, saved=None, **changes):
        tried.clear()
        monkeypatch.setattr(fitting, "free", lambda devices, held: limit)
        config = replace(Config(remat="auto", batch_size=4), **changes)
        return fitting_remat(config, model, mesh, SHAPE, lambda one: one, None, saved)

    choice.tried = tried
    return choice


@pytest.mark.parametrize("limit, policy", [(948, "dots"), (947, "gate"), (550, "qkv"), (400, "attention")])
def test_a_share_of_the_memory_stays_free(choice, limit, policy):
    """95% of 948 are 900."""
    found = choice(limit)
    assert found.policy == policy and found.limit == int(0.95 * limit)
    assert found.needed == {each: SIZES[each] for each in choice.tried}


def test_a_device_that_tells_no_limit(choice):
    found = choice(None)
    assert (found.policy, choice.tried) == ("none", []) and "tell no limit" in str(found)


def test_a_run_that_goes_on_keeps_its_policy(choice):
    saved = json.loads(json.dumps(choice(550).to_json()))
    assert choice(2000, saved).policy == "qkv" and not choice.tried
    assert choice(2000, saved, micro_batches=2).policy == "dots", "found for another step"
    assert choice(2000, saved | {"policy": "some"}).policy == "dots"
    assert choice(2000, "qkv").policy == "dots"


def test_a_line_says_what_was_found(choice):
    gibs = 2**30
    fit = replace(choice(550), limit=15 * gibs, needed={"qkv": 11 * gibs, "gate": None})
    words = "remat qkv: of 15.00 GiB a device that a step may take, it takes gate too much, qkv 11.00"
    assert str(fit) == words
