"""float32 asks for full-precision matrix products in the programs of its own model, and in no other's."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from runs import MODEL, TINY, compiling, one_device

from mllm_align.batch import Shape
from mllm_align.config import BDHSConfig, SamplingConfig
from mllm_align.generation import decode, rollout
from mllm_align.models.bundle import load
from mllm_align.models.sentence_encoder import encode
from mllm_align.plan.targets import Sizes, lower
from mllm_align.sharding import replicated
from mllm_align.training.programs import batch_structs, struct, train_program

assert compiling  # a fixture

PLANNED = Sizes(Shape(prefix=64, response=32, tiles=1), 4, ((0, 1),))
SAMPLING = SamplingConfig(max_tokens=4)


@pytest.fixture(autouse=True)
def plain():
    """As for users: the tests' own setting asks for full precision everywhere."""
    cached = decode.programs, rollout.rollout_program, rollout.features_program, rollout.distorted_program
    before = jax.config.values["jax_default_matmul_precision"]
    jax.config.update("jax_default_matmul_precision", None)
    for each in cached:
        each.cache_clear()
    yield
    jax.config.update("jax_default_matmul_precision", before)
    for each in cached:
        each.cache_clear()


def programs(bundle):
    """Name -> how to lower each program that computes with a model."""
    model, mesh, dtype = bundle.config, bundle.mesh, bundle.dtype
    config = replace(TINY, dtype=str(dtype))
    made = train_program(config, model, mesh, 10)
    batch = batch_structs(config, model, mesh, PLANNED.shape, PLANNED.views)
    rows, whole = batch.responses.weight.sharding, replicated(mesh)
    keys, sample_keys = (
        struct((*batch.responses.weight.shape, *n), jnp.uint32, rows) for n in ((2,), (2, 2))
    )
    stops, number = struct((model.decoder.vocab,), jnp.bool_, whole), struct((), jnp.int32, whole)
    settings, base = (model, mesh, 1.0, dtype), (made.base, {})
    sampled = rollout.rollout_program(*settings, SAMPLING)
    generation = BDHSConfig(dtype=str(dtype), batch_size=4)
    return {
        "train": lambda: made.step.lower(made.state, made.base, batch),
        "evaluate": lambda: made.evaluate.lower(made.state.trained, made.base, batch, made.state.objective),
        "score": lambda: lower("reference", config, model, mesh, PLANNED),
        "rollout": lambda: sampled.lower(*base, batch, sample_keys, stops),
        "tower": lambda: rollout.features_program(*settings).lower(*base, batch.prefix, number),
        "distorted": lambda: rollout.distorted_program(*settings, 10).lower(*base, batch, keys),
        "features": lambda: lower("features", generation, model, mesh, PLANNED),
        "prefill": lambda: lower("prefill", generation, model, mesh, PLANNED),
        "decode": lambda: lower("decode", generation, model, mesh, PLANNED),
    }


def precisions(text):
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    return {"highest" if "[HIGHEST, HIGHEST]" in dot else "default" for dot in dots}


ORDERS = [("float32", "bfloat16"), ("bfloat16", "float32")]


def check(order, names=None):
    """Both are loaded before any program of either is traced."""
    bundles = {dtype: load(MODEL, dtype, one_device()) for dtype in order}
    for dtype in order:
        made = programs(bundles[dtype])
        for name in names or made:
            wanted = {"highest" if dtype == "float32" else "default"}
            assert precisions(made[name]().as_text()) == wanted, (dtype, name)


def test_a_judge_in_float32_leaves_a_policy_in_bfloat16_alone():
    check(ORDERS[0], ["score"])


@pytest.mark.slow
def test_every_program_has_its_own_precision():
    check(ORDERS[1])


def test_sentence_encoders_ask_for_themselves():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    linear, norm = ({"weight": leaf(1, *shape), "bias": leaf(1, 8)} for shape in ((8, 8), (8,)))
    layers = dict.fromkeys(("q", "k", "v", "o", "up", "down"), linear)
    layers |= dict.fromkeys(("attention_norm", "mlp_norm"), norm)
    first = {"word": leaf(9, 8), "position": leaf(32, 8), "norm": {"weight": leaf(8), "bias": leaf(8)}}
    params = {**first, "layers": layers}
    ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 32), (2,)))
    text = encode.lower(params, ids, lengths, 2, 1e-5, "mean").as_text()
    assert precisions(text) == {"highest"}
