"""Model FLOPs against the matrix products of a plain implementation, and against XLA's own count."""

from dataclasses import replace
from math import prod
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_align.batch import Shape
from mllm_align.data.encode import Encoded
from mllm_align.models.config import DecoderConfig, LocalLayers
from mllm_align.models.families.llava.config import LlavaConfig
from mllm_align.models.families.llava.vision import ClipConfig
from mllm_align.models.families.registry import family_of
from mllm_align.training import flops
from mllm_align.training.flops import (
    decoder_flops,
    forward_flops,
    group_flops,
    pairs,
    peak_flops,
    step_flops,
    train_flops,
    vision_flops,
)

CONFIG = LlavaConfig(
    family="llava",
    vision=ClipConfig(hidden=48, mlp=96, layers=3, heads=4, image_size=24, patch_size=4),
    decoder=DecoderConfig(vocab=160, hidden=64, mlp=112, layers=2, heads=6, kv_heads=2, head_dim=16),
    image_token=4,
)


def products(jaxpr):
    """FLOPs of all matrix products that a jaxpr runs: 2 m n k each, a scan's as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * prod(equation.outvars[0].aval.shape) * prod(left[d] for d in contracted)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# ---- a decoder as one writes it on a blackboard: every query meets every key -------------------------


def weights(config):
    v, d = config.vision, config.decoder
    width, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    block = {"q": (d.hidden, width), "k": (d.hidden, kv), "v": (d.hidden, kv), "o": (width, d.hidden)}
    block |= {"gate": (d.hidden, d.mlp), "up": (d.hidden, d.mlp), "down": (d.mlp, d.hidden)}
    return {
        "fc_1": struct(v.hidden, d.hidden),
        "fc_2": struct(d.hidden, d.hidden),
        "layers": [{name: struct(*shape) for name, shape in block.items()} for _ in range(d.layers)],
        "head": struct(d.hidden, d.vocab),
    }


def plain(w, features, text, predicted):
    """Logits of the last `predicted` positions of one row: image features [I, Dv], then text [T, D]."""
    d = CONFIG.decoder
    x = jnp.concatenate([jax.nn.gelu(features @ w["fc_1"]) @ w["fc_2"], text])
    for layer in w["layers"]:
        q, k, v = ((x @ layer[name]).reshape(len(x), -1, d.head_dim) for name in "qkv")
        k, v = (jnp.repeat(each, d.heads // d.kv_heads, axis=1) for each in (k, v))
        seen = jnp.tril(jnp.ones((len(x), len(x)), bool))[None]
        scores = jnp.where(seen, jnp.einsum("qhe,khe->hqk", q, k), -1e30)
        x = x + jnp.einsum("hqk,khe->qhe", jax.nn.softmax(scores), v).reshape(len(x), -1) @ layer["o"]
        x = x + (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
    return x[-predicted:] @ w["head"]


def traced(tiles, text, predicted):
    features = struct(tiles * CONFIG.vision.tokens, CONFIG.vision.hidden)
    return weights(CONFIG), features, struct(text, CONFIG.decoder.hidden), predicted


@pytest.mark.parametrize("tiles, text, predicted", [(1, 9, 5), (3, 20, 1)])
def test_decoder_counts_the_products_of_a_plain_one(tiles, text, predicted):
    jaxpr = jax.make_jaxpr(plain, static_argnums=3)(*traced(tiles, text, predicted)).jaxpr
    tokens = tiles * CONFIG.vision.tokens + text
    assert decoder_flops(CONFIG, tiles, tokens, tokens**2, predicted) == products(jaxpr)


def test_xla_counts_as_many_on_an_unrolled_decoder():
    """XLA's count has what lies between the products, too."""
    compiled = jax.jit(plain, static_argnums=3).lower(*traced(2, 24, 8)).compile()
    tokens = 2 * CONFIG.vision.tokens + 24
    ratio = compiled.cost_analysis()["flops"] / decoder_flops(CONFIG, 2, tokens, tokens**2, 8)
    assert 1 <= ratio < 1.15


@pytest.mark.parametrize("tiles", [1, 4])
def test_tower_counts_the_products_of_its_blocks(tiles):
    """The tower itself also projects patches, which is left out: 1% of CLIP's."""
    v, tower = CONFIG.vision, family_of(CONFIG).tower(CONFIG, "none")
    pixels = struct(tiles, v.patches, v.patch_width), jax.ShapeDtypeStruct((tiles, v.patches, 2), jnp.int16)
    params = jax.eval_shape(tower.init, jax.random.key(0), *pixels)
    found = products(jax.make_jaxpr(tower.apply)(params, *pixels).jaxpr)
    patches = 2 * tiles * v.patches * v.patch_width * v.hidden
    assert vision_flops(CONFIG, tiles) == found - patches


def test_a_group_counts_what_its_tokens_see():
    """Of the causal half; each response sees the prefix and itself; predicted are all but their first."""
    prefix, answers = 300, (40, 70)
    own = np.repeat([0, 1, 2], [prefix, *answers])
    at = np.arange(len(own))
    sees = (at[None] <= at[:, None]) & ((own[None] == 0) | (own[None] == own[:, None]))
    vision, rest = group_flops(CONFIG, 2, prefix, answers)
    assert vision == vision_flops(CONFIG, 2)
    wanted = decoder_flops(CONFIG, 2, 410, sees.sum(), 1 + 39 + 69)
    assert rest == pytest.approx(wanted, rel=2e-3), "but for the diagonal, which counts half"
    assert rest < wanted
    linear = decoder_flops(CONFIG, 2, 410, 0, 109)
    assert rest - linear == pytest.approx(wanted - linear, rel=1e-2)


@pytest.mark.parametrize("queries, before", [(30, 0), (30, 7), (5, 40), (200, 300)])
def test_layers_with_a_window_count_what_they_see(queries, before):
    local = LocalLayers((True, False, True), window=20, rope_theta=1e4)
    at = before + np.arange(queries)
    wanted = [np.minimum(at + 0.5, 20).sum(), (at + 0.5).sum(), np.minimum(at + 0.5, 20).sum()]
    found = pairs(replace(CONFIG.decoder, layers=3, local=local), queries, before)
    assert found == pytest.approx(np.mean(wanted), abs=1)
    assert pairs(CONFIG.decoder, queries, before) == queries * before + queries**2 / 2


def test_a_reward_model_has_no_vocabulary():
    d = CONFIG.decoder
    whole, scores = (group_flops(CONFIG, 2, 300, (40, 70), logits) for logits in (True, False))
    assert whole[0] == scores[0] and whole[1] - scores[1] == 2 * (1 + 39 + 69) * d.hidden * d.vocab


@pytest.mark.parametrize(
    "settings, passes",
    [
        ({"lora": True, "tower": False, "reference": False}, (1, 2)),
        ({"lora": True, "tower": False, "reference": True}, (1, 3)),
        ({"lora": True, "tower": False, "reference": False, "values": True}, (1, 4)),
        ({"lora": False, "tower": False, "reference": False}, (1, 3)),
        ({"lora": False, "tower": True, "reference": False}, (3, 3)),
        ({"lora": False, "tower": True, "reference": True}, (4, 4)),
    ],
)
def test_a_step_is_so_many_forward_passes(settings, passes):
    """A frozen tower is run once for policy and reference; one that is trained differs between them."""
    assert train_flops((1000.0, 1.0), **settings) == passes[0] * 1000 + passes[1]


def test_a_step_adds_up_its_records():
    def record(prefix, tiles, answers):
        ids = tuple(np.zeros(n, np.int32) for n in answers)
        return Encoded(None, np.zeros(0), ids, (), Shape(prefix, max(answers), tiles))  # type: ignore[arg-type]

    records = [record(50, 1, (4, 9)), record(120, 3, (7, 2))]
    parts = [group_flops(CONFIG, 1, 50, (4, 9)), group_flops(CONFIG, 3, 120, (7, 2))]
    assert [forward_flops(CONFIG, record) for record in records] == parts
    found = step_flops(CONFIG, records, lora=True, tower=False, reference=True)
    assert found == pytest.approx(sum(vision + 3 * rest for vision, rest in parts))

    two = replace(records[1], second=record(80, 2, (7,)))
    towers, rest = zip(parts[1], group_flops(CONFIG, 2, 80, (7,)), strict=True)
    assert forward_flops(CONFIG, two) == (sum(towers), sum(rest)), "each prefix with its responses"
    assert two.tokens == 120 + 9 + 80 + 7


def test_the_peak_is_that_of_all_devices(monkeypatch):
    assert peak_flops() is None, "a CPU's is not known"
    monkeypatch.setattr(flops.jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite")] * 4)
    monkeypatch.setattr(flops.jax, "device_count", lambda: 4)
    assert peak_flops() == 4 * 197e12
