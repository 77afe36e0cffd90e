"""Gemma 3 folders: what is read, what is refused; and what its decoder has that others have not.

That they compute what transformers does is in test_parity.py, runs with them in test_family_runs.py, their
images in test_gemma3_layout.py.
"""

import copy
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import FIXTURES, goldens
from refusals import refusal
from roundtrip import round_trip

import mllm_align
from mllm_align.batch import pad
from mllm_align.models.config import LinearRope
from mllm_align.models.families.registry import parse_config, presets
from mllm_align.models.layers import RMSNorm, frequencies
from mllm_align.models.vlm import VisionLanguageModel
from mllm_align.plan.targets import sizes

WHOLE = {
    "model_type": "gemma3",
    "image_token_index": 4,
    "mm_tokens_per_image": 4,
    "text_config": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"vocab_size": 300, "num_hidden_layers": 7, "head_dim": 16},
    "vision_config": {"hidden_size": 64, "num_attention_heads": 4, "image_size": 56, "patch_size": 14},
}

# ---- config.json ---------------------------------------------------------------------------------------

OLDER = {
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 7,
    "rope_local_base_freq": 3.5,
}
NEWER = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_theta": 9},
    },
    "layer_types": ["full_attention", *["sliding_attention"] * 25],
    "query_pre_attn_scalar": 168,
}


@pytest.mark.parametrize("vision", [None, {"image_size": 896, "patch_size": 14}])
@pytest.mark.parametrize(
    "text", [None, {}, OLDER, NEWER, {"sliding_window_pattern": 2, "sliding_window": 5}]
)
def test_what_is_left_out_means_what_it_means_to_transformers(vision, text, tmp_path):
    from transformers import Gemma3Config

    raw = {"model_type": "gemma3", "vision_config": vision, "text_config": copy.deepcopy(text)}
    if vision is None:
        raw["mm_tokens_per_image"] = 49  # the default does not fit the default tower
    ours = parse_config(tmp_path, copy.deepcopy(raw))
    theirs = Gemma3Config.from_dict(copy.deepcopy(raw))
    v, t, o, d = theirs.vision_config, theirs.text_config, ours.vision, ours.decoder
    assert (o.hidden, o.mlp, o.layers, o.heads, o.image_size, o.patch_size, o.activation, o.norm_eps) == (
        v.hidden_size,
        v.intermediate_size,
        v.num_hidden_layers,
        v.num_attention_heads,
        v.image_size,
        v.patch_size,
        v.hidden_act,
        v.layer_norm_eps,
    )
    assert o.tokens == d.image_block == theirs.mm_tokens_per_image
    assert (d.vocab, d.hidden, d.mlp, d.layers, d.heads, d.kv_heads, d.head_dim, d.norm_eps) == (
        t.vocab_size,
        t.hidden_size,
        t.intermediate_size,
        t.num_hidden_layers,
        t.num_attention_heads,
        t.num_key_value_heads,
        t.head_dim,
        t.rms_norm_eps,
    )
    assert d.local.layers == tuple(kind == "sliding_attention" for kind in t.layer_types)
    far, near = (t.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    assert (d.local.window, d.local.rope_theta) == (t.sliding_window, near["rope_theta"])
    assert (d.rope_theta, near["rope_type"]) == (far["rope_theta"], "default")
    assert d.rope_scaling == (LinearRope(far["factor"]) if far["rope_type"] == "linear" else None)
    assert d.query_scale == pytest.approx(t.query_pre_attn_scalar**-0.5 * t.head_dim**0.5)
    assert (d.activation, d.max_length) == (t.hidden_activation, t.max_position_embeddings)
    assert (d.qkv_bias, d.o_bias, d.mlp_bias, d.post_norms, d.norm_offset) == (*[False] * 3, True, 1.0)
    assert d.tied is theirs.tie_word_embeddings is True
    assert ours.image_token == theirs.image_token_index


# What the published folders say, but for what nothing reads.
TEXT = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
TEXT |= {"sliding_window": 1024}
TOWER = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
TOWER |= {"num_attention_heads": 16, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14}
TOWER |= {"vision_use_head": False}
PUBLISHED = {
    "gemma-3-4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "gemma-3-12b": {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
    "gemma-3-27b": {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62}
    | {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    | {"query_pre_attn_scalar": 168},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name, tmp_path):
    raw = {"model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000}
    raw |= {"image_token_index": 262144, "mm_tokens_per_image": 256, "vision_config": TOWER}
    assert parse_config(tmp_path, raw | {"text_config": TEXT | PUBLISHED[name]}) == presets()[name]
    planned = sizes(mllm_align.Config(), presets()[name]).shape
    assert (planned.tiles, planned.prefix) == (1, 384)


SIZES = (0, -4, 10**9, "64", None, [64], True, 64.0, math.nan)


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("vision_config", "hidden_size", SIZES),
        ("vision_config", "model_type", ("clip_vision_model", None)),
        ("vision_config", "image_size", SIZES),
        ("text_config", "num_hidden_layers", SIZES),
        ("text_config", "head_dim", (*SIZES[:-2], 17)),
        ("text_config", "num_key_value_heads", (3, "2", None)),
        ("text_config", "model_type", ("gemma2", None)),
        ("text_config", "hidden_activation", ("relu", None)),
        ("text_config", "attn_logit_softcapping", (50.0, False)),
        ("text_config", "final_logit_softcapping", (30.0,)),
        ("text_config", "use_bidirectional_attention", (True, "no")),
        ("text_config", "sliding_window", (0, None, "8")),
        ("text_config", "sliding_window_pattern", (0, None)),
        ("text_config", "layer_types", (["full_attention"], ["chunked_attention"] * 7, "full_attention")),
        ("text_config", "query_pre_attn_scalar", (0, -1, math.inf, None)),
        ("text_config", "rope_local_base_freq", (0, "1e4")),
        ("text_config", "rope_scaling", ({"rope_type": "yarn"}, {"rope_type": "linear"}, [8])),
        (
            "text_config",
            "rope_parameters",
            (
                {"full_attention": [1]},
                {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
                {"full_attention": {"rope_type": "linear", "factor": 0}},
            ),
        ),
        (None, "mm_tokens_per_image", (0, 5, 9, 256, None, "4")),
        (None, "image_token_index", (-1, 300, "4", None, True)),
        (None, "tie_word_embeddings", (1, "true")),
        (None, "text_config", ("gemma3_text", [])),
    ],
)
def test_what_is_not_computed_is_refused_by_name(part, field, values, tmp_path):
    assert parse_config(tmp_path, copy.deepcopy(WHOLE)).vision.pool == 2
    for value in values:
        raw = copy.deepcopy(WHOLE)
        (raw[part] if part else raw)[field] = value
        message = refusal(parse_config, tmp_path, raw)
        assert field in message or field in ("hidden_size", "image_size", "head_dim"), message


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3n"])
def test_relatives_without_this_tower_are_of_no_family(kind, tmp_path):
    assert repr(kind) in refusal(parse_config, tmp_path, WHOLE | {"model_type": kind})


# ---- folders -------------------------------------------------------------------------------------------


def newer(name):
    """As transformers names them within the model's class since 4.52."""
    head = name.replace("language_model.lm_head", "lm_head")
    return (
        head
        if head.startswith("lm_head")
        else "model." + head.replace("language_model.model", "language_model")
    )


def published(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("rename", [newer, published])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_come_back_bit_for_bit(rename, tied, tmp_path):
    _, copied = round_trip(FIXTURES / "gemma3", tmp_path, rename, tied)
    assert copied == 0


# ---- the decoder ---------------------------------------------------------------------------------------


def test_gains_of_norms_are_stored_less_one_and_rounded_once():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.bfloat16)
    gain = jnp.asarray(0.1 * rng.standard_normal(64), jnp.bfloat16)
    found = RMSNorm(1e-6, offset=1.0).apply({"params": {"scale": gain}}, x)
    wide, gain = (np.asarray(each, np.float64) for each in (x, gain))
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + gain)
    np.testing.assert_array_equal(found, jnp.asarray(wanted.astype(np.float32), jnp.bfloat16))


def test_the_factor_slows_all_waves():
    slow = frequencies(16, 1e6, LinearRope(8.0))
    np.testing.assert_allclose(slow, 1e6 ** -(np.arange(8) / 8) / 8, rtol=1e-6)


def test_embeddings_of_text_are_scaled_in_their_dtype():
    golden = goldens("gemma3")
    config = replace(golden.config.decoder, hidden=3072, tied=True)
    table = jnp.ones((config.vocab, 3072), jnp.bfloat16)
    model = VisionLanguageModel(replace(golden.config, decoder=config))
    params = {"decoder": {"embedding": table}}
    found = model.apply({"params": params}, jnp.array([3]), method=lambda m, ids: m.decoder.embed(ids))
    assert found.dtype == jnp.bfloat16 and (np.asarray(found, np.float32) == 55.5).all()


@pytest.mark.slow
def test_a_window_that_holds_the_whole_row_is_no_condition():
    """The two kinds of layers are not even traced apart."""
    golden = goldens("gemma3")
    (group, *_) = golden.groups()
    batch = pad([group], group.shape, 1)
    longest, decoder = group.shape.prefix + group.shape.response, golden.config.decoder
    assert decoder.local is not None

    def conditional(window):
        local = replace(decoder.local, window=window)
        model = VisionLanguageModel(replace(golden.config, decoder=replace(decoder, local=local)))
        made = jax.jit(lambda params: model.apply({"params": params}, batch)[0]).trace(golden.base)
        return " cond[" in str(made.jaxpr)

    assert (conditional(longest - 1), conditional(longest)) == (True, False)
