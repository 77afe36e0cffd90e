"""Qwen3-VL folders: what is read, what is refused; and the tower's own arithmetic.

That they compute what transformers does is in test_parity.py, runs with them in test_family_runs.py, their
images in test_qwen3_vl_layout.py.
"""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import FIXTURES, goldens
from refusals import refusal
from roundtrip import round_trip

import mllm_align
from mllm_align.models.families.qwen3_vl.vision import Positions, Qwen3VisionConfig, extents
from mllm_align.models.families.registry import parse_config, presets
from mllm_align.plan.targets import sizes

WHOLE = {
    "model_type": "qwen3_vl",
    "image_token_id": 4,
    "text_config": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"vocab_size": 300, "num_hidden_layers": 20},
    "vision_config": {"hidden_size": 64, "num_heads": 4, "out_hidden_size": 64},
}

# ---- config.json ---------------------------------------------------------------------------------------

OLDER = {
    "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]},
    "rope_theta": 7,
    "head_dim": 32,
}
NEWER = {"rope_parameters": {"rope_theta": 9.0, "mrope_section": [24, 20, 20], "rope_type": "default"}}


@pytest.mark.parametrize("vision", [None, {"depth": 30, "model_type": "qwen3_vl"}])
@pytest.mark.parametrize("text", [None, {}, OLDER, NEWER])
def test_what_is_left_out_means_what_it_means_to_transformers(vision, text, tmp_path):
    from transformers import Qwen3VLConfig

    raw = {
        "model_type": "qwen3_vl",
        "vision_config": copy.deepcopy(vision),
        "text_config": copy.deepcopy(text),
    }
    if text is None:  # transformers' defaults do not go together
        raw["text_config"] = {"hidden_size": 3584}
    else:
        raw["vision_config"] = (vision or {}) | {"out_hidden_size": 4096}
    ours = parse_config(tmp_path, copy.deepcopy(raw))
    theirs = Qwen3VLConfig.from_dict(copy.deepcopy(raw))
    v, t, o, d = theirs.vision_config, theirs.text_config, ours.vision, ours.decoder
    assert (o.hidden, o.mlp, o.layers, o.heads, o.side**2, o.out, o.activation) == (
        v.hidden_size,
        v.intermediate_size,
        v.depth,
        v.num_heads,
        v.num_position_embeddings,
        v.out_hidden_size,
        v.hidden_act,
    )
    assert (o.patch_size, o.frames, o.merge, o.deepstack) == (
        v.patch_size,
        v.temporal_patch_size,
        v.spatial_merge_size,
        tuple(v.deepstack_visual_indexes),
    )
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
    rope = t.rope_parameters
    assert d.rope_theta == rope["rope_theta"]
    assert d.rope_sections == tuple(rope.get("mrope_section", (24, 20, 20)))
    assert (d.max_length, d.qkv_bias, d.o_bias) == (t.max_position_embeddings, False, False)
    assert d.tied is theirs.tie_word_embeddings is False
    assert ours.image_token == theirs.image_token_id


# What the published folders say, but for what nothing reads.
ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
TEXT = {"model_type": "qwen3_vl_text", "vocab_size": 151936, "max_position_embeddings": 262144}
TEXT |= {"rope_scaling": ROPE, "rope_theta": 5000000, "rms_norm_eps": 1e-06, "num_key_value_heads": 8}
TEXT |= {"head_dim": 128, "attention_bias": False, "hidden_act": "silu"}
TOWER = {"model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304, "patch_size": 16}
SMALL = TOWER | {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
SMALL |= {"deepstack_visual_indexes": [5, 11, 17]}
LARGE = TOWER | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
LARGE |= {"deepstack_visual_indexes": [8, 16, 24]}
PUBLISHED = {
    "qwen3-vl-2b": (SMALL, 2048, 6144, 28, 16, True),
    "qwen3-vl-4b": (SMALL, 2560, 9728, 36, 32, True),
    "qwen3-vl-8b": (LARGE, 4096, 12288, 36, 32, False),
    "qwen3-vl-32b": (LARGE, 5120, 25600, 64, 64, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name, tmp_path):
    tower, hidden, mlp, layers, heads, tied = PUBLISHED[name]
    text = TEXT | {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    raw = {"model_type": "qwen3_vl", "image_token_id": 151655, "tie_word_embeddings": tied}
    raw |= {"text_config": text | {"num_attention_heads": heads}}
    raw |= {"vision_config": tower | {"out_hidden_size": hidden}}
    assert parse_config(tmp_path, raw) == presets()[name]
    planned = sizes(mllm_align.Config(), presets()[name]).shape
    assert (planned.tiles, planned.prefix) == (1280, 1408)


SIZES = (0, -4, 10**9, "64", None, [64], True, 64.0, math.nan)


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("vision_config", "hidden_size", SIZES),
        ("vision_config", "depth", (*SIZES, 24)),  # of which 24 would be the 25th
        ("vision_config", "patch_size", SIZES),
        ("vision_config", "num_heads", (*SIZES, 3, 32)),
        ("vision_config", "num_position_embeddings", (*SIZES, 2305)),
        ("vision_config", "out_hidden_size", (*SIZES, 32)),
        (
            "vision_config",
            "deepstack_visual_indexes",
            ([8, 8], [16, 8], [27], [-1], None, 8, list(range(27))),
        ),
        ("vision_config", "spatial_merge_size", SIZES[:-2]),
        ("vision_config", "temporal_patch_size", SIZES[:-2]),
        ("vision_config", "hidden_act", ("relu", None)),
        ("vision_config", "in_channels", (1, None)),
        ("vision_config", "model_type", ("qwen2_5_vl", None)),
        ("vision_config", "rope_parameters", ({"rope_type": "default"}, {"rope_theta": 1e6})),
        ("text_config", "hidden_act", ("gelu",)),
        ("text_config", "model_type", ("qwen3_vl_moe_text", None)),
        ("text_config", "head_dim", (*SIZES[:-2], 17)),
        ("text_config", "rope_scaling", ({"rope_type": "yarn"}, {"mrope_interleaved": False})),
        ("text_config", "rope_parameters", ({"mrope_section": [2, 3]}, {"rope_type": "dynamic"})),
        ("text_config", "num_key_value_heads", (3, "2")),
        (None, "image_token_id", (-1, 300, "4", None, True)),
        (None, "tie_word_embeddings", (1, "true")),
        (None, "text_config", ("qwen3", [])),
    ],
)
def test_what_is_not_computed_is_refused_by_name(part, field, values, tmp_path):
    assert parse_config(tmp_path, copy.deepcopy(WHOLE)).vision.features == 4 * 64 + 3 * 64
    for value in values:
        raw = copy.deepcopy(WHOLE)
        (raw[part] if part else raw)[field] = value
        message = refusal(parse_config, tmp_path, raw)
        assert field in message or field in ("hidden_size", "depth"), message


def test_a_mixture_of_experts_is_of_no_family(tmp_path):
    assert "qwen3_vl_moe" in refusal(parse_config, tmp_path, WHOLE | {"model_type": "qwen3_vl_moe"})


# ---- folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_folders_come_back_bit_for_bit(tied, tmp_path):
    _, copied = round_trip(FIXTURES / "qwen3_vl", tmp_path, lambda name: name, tied)
    assert copied == 0


# ---- the tower -----------------------------------------------------------------------------------------


def test_axes_of_rotation_take_turns():
    axes = presets()["qwen3-vl-2b"].decoder.rope_axes
    assert axes[:9] == (0, 1, 2) * 3 and axes[60:] == (0,) * 4
    assert [axes.count(axis) for axis in range(3)] == [24, 20, 20]
    assert goldens("qwen3_vl").config.decoder.rope_axes == (0, 1, 2, 0, 1, 2, 0, 0)


def test_images_are_told_apart_by_the_places_of_their_patches():
    layout = goldens("qwen3_vl").layout
    one, two = (
        layout.patched(np.zeros((4 * down * across, 384)), down, across)
        for down, across in ((2, 1), (1, 3))
    )
    filled = np.full((2, 4, 2), -1, np.int16)
    place = np.concatenate([one.place, two.place, filled]).reshape(1, -1, 2)
    images, last = extents(jnp.asarray(place))
    assert images[0].tolist() == [1] * 8 + [2] * 12 + [0] * 8
    assert np.asarray(last)[0, :20].tolist() == [[3, 1]] * 8 + [[1, 5]] * 12


@pytest.mark.parametrize("rows, columns", [(4, 6), (2, 20), (48, 48)])
def test_position_embeddings_are_resampled(rows, columns):
    """Bilinear, corners on corners: numpy's interpolation along both sides."""
    config = Qwen3VisionConfig(hidden=2, mlp=2, layers=1, heads=1, side=7, out=2, deepstack=())
    table = np.random.default_rng(0).standard_normal((7, 7, 2)).astype(np.float32)
    place = np.indices((rows, columns), np.int16).reshape(2, -1).T[None]
    last = np.broadcast_to(np.array([rows - 1, columns - 1], np.int16), place.shape)
    variables = {"params": {"embedding": table.reshape(49, 2)}}
    found = jax.jit(Positions(config).apply)(variables, place, last)

    def along(x, count, axis):
        at = np.linspace(0, 6, count)
        return np.apply_along_axis(lambda line: np.interp(at, np.arange(7), line), axis, x)

    wanted = along(along(table, rows, 0), columns, 1).reshape(1, -1, 2)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
