"""Qwen2.5-VL folders: what is read, what is refused; and windows of the tower.

That they compute what transformers does is in test_parity.py, runs with them in test_family_runs.py, their
images in test_qwen_vl_layout.py.
"""

import copy
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import FIXTURES
from refusals import refusal
from roundtrip import round_trip

import mllm_align
from mllm_align.batch import padded
from mllm_align.models.families.qwen2_5_vl.vision import Qwen25Tower, Qwen25VisionConfig, windows_of
from mllm_align.models.families.qwen_vl.layout import QwenLayout
from mllm_align.models.families.qwen_vl.vision import images_of
from mllm_align.models.families.registry import parse_config, presets
from mllm_align.plan.targets import sizes

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
SMALL |= {"num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
WHOLE = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 4,
    "text_config": SMALL,
    "vision_config": {"hidden_size": 64, "num_heads": 4, "out_hidden_size": 64},
}

# ---- config.json ---------------------------------------------------------------------------------------

# As on the hub; `in_chans` and `spatial_patch_size` are read by nothing.
ROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
TEXT = {"rope_scaling": ROPE, "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "hidden_act": "silu"}
TEXT |= {"max_position_embeddings": 128000, "use_sliding_window": False, "sliding_window": 32768}
TOWER = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "num_heads": 16, "in_chans": 3}
TOWER |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112}
TOWER |= {"fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}
PUBLISHED = {
    "qwen2.5-vl-3b": (2048, 11008, 36, 16, 2, 3420, 151936, True),
    "qwen2.5-vl-7b": (3584, 18944, 28, 28, 4, 3420, 152064, False),
    "qwen2.5-vl-32b": (5120, 27648, 64, 40, 8, 3456, 152064, False),
    "qwen2.5-vl-72b": (8192, 29568, 80, 64, 8, 3456, 152064, False),
}


def published(name):
    """config.json as on the hub: the decoder's fields beside the rest."""
    hidden, mlp, layers, heads, kv_heads, vision_mlp, vocab, tied = PUBLISHED[name]
    text = TEXT | {"hidden_size": hidden, "intermediate_size": mlp, "vocab_size": vocab}
    text |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    raw = {"model_type": "qwen2_5_vl", "image_token_id": 151655, "tie_word_embeddings": tied} | text
    tower = TOWER | {"intermediate_size": vision_mlp, "out_hidden_size": hidden}
    return raw | {"vision_config": tower}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name, tmp_path):
    raw = published(name)
    assert parse_config(tmp_path, raw) == presets()[name]
    # as transformers 4.53 saves them: both ways, in text_config alone what holds
    text = {"model_type": "qwen2_5_vl_text", "rope_scaling": ROPE | {"type": "default"}} | {
        key: raw[key] for key in (*TEXT, *SMALL) if key != "rope_scaling"
    }
    text |= {"intermediate_size": raw["intermediate_size"]}
    both = raw | {"text_config": text, "hidden_size": 17}
    assert parse_config(tmp_path, both) == presets()[name]
    planned = sizes(mllm_align.Config(), presets()[name]).shape
    assert (planned.tiles, planned.prefix) == (1280, 1408)


OLDER = {"rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]}, "rope_theta": 7}
OLDER |= {"num_attention_heads": 256, "num_key_value_heads": None}
NEWER = {"rope_parameters": {"rope_theta": 9.0, "mrope_section": [16, 24, 24], "rope_type": "default"}}
WINDOW = {"use_sliding_window": True, "sliding_window": 1000, "max_window_layers": 79}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("text", [{}, OLDER, NEWER, WINDOW, {"tie_word_embeddings": True}])
def test_what_is_left_out_means_what_it_means_to_transformers(text, flat, tmp_path):
    from transformers import Qwen2_5_VLConfig

    raw = {"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}}
    raw |= copy.deepcopy(text) if flat else {"text_config": copy.deepcopy(text)}
    ours = parse_config(tmp_path, copy.deepcopy(raw))
    theirs = Qwen2_5_VLConfig.from_dict(copy.deepcopy(raw))
    v, t, o, d = theirs.vision_config, theirs.text_config, ours.vision, ours.decoder
    assert (o.hidden, o.mlp, o.layers, o.heads, o.out, o.activation) == (
        v.hidden_size,
        v.intermediate_size,
        v.depth,
        v.num_heads,
        v.out_hidden_size,
        v.hidden_act,
    )
    assert (o.patch_size, o.frames, o.merge, o.full, o.window) == (
        v.patch_size,
        v.temporal_patch_size,
        v.spatial_merge_size,
        tuple(v.fullatt_block_indexes),
        v.window_size // v.spatial_merge_size // v.patch_size,
    )
    assert (d.vocab, d.hidden, d.mlp, d.layers, d.heads, d.kv_heads, d.norm_eps) == (
        t.vocab_size,
        t.hidden_size,
        t.intermediate_size,
        t.num_hidden_layers,
        t.num_attention_heads,
        t.num_key_value_heads,
        t.rms_norm_eps,
    )
    rope = t.rope_parameters
    assert d.head_dim == t.hidden_size // t.num_attention_heads and d.rope_theta == rope["rope_theta"]
    assert d.rope_sections == tuple(rope.get("mrope_section", (16, 24, 24))) and not d.rope_interleaved
    assert (d.qkv_bias, d.o_bias, d.mlp_bias, d.qk_norm) == (True, False, False, False)
    assert d.max_length == (t.sliding_window or t.max_position_embeddings)
    assert d.tied is theirs.tie_word_embeddings
    assert ours.image_token == theirs.image_token_id


SIZES = (0, -4, 10**9, "64", None, [64], True, 64.0, math.nan)


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("vision_config", "hidden_size", SIZES),
        ("vision_config", "depth", SIZES),
        ("vision_config", "patch_size", SIZES),
        ("vision_config", "window_size", (*SIZES, 27)),
        ("vision_config", "num_heads", (*SIZES, 3, 32)),
        ("vision_config", "out_hidden_size", (*SIZES, 32)),
        ("vision_config", "fullatt_block_indexes", ([-1], None, 8, ["7"])),
        ("vision_config", "spatial_merge_size", SIZES[:-2]),
        ("vision_config", "temporal_patch_size", SIZES[:-2]),
        ("vision_config", "hidden_act", ("relu", None)),
        ("vision_config", "in_channels", (1, None)),
        ("vision_config", "model_type", ("qwen3_vl", None)),
        ("vision_config", "rope_parameters", ({"rope_type": "default"}, {"rope_theta": 1e6})),
        ("text_config", "hidden_act", ("gelu",)),
        ("text_config", "model_type", ("qwen2_5_omni_text", None)),
        ("text_config", "head_dim", (32, "16")),
        ("text_config", "num_attention_heads", (6, 64)),
        ("text_config", "rope_scaling", ({"rope_type": "yarn"}, {"type": "dynamic"}, "mrope", [1])),
        ("text_config", "mrope_section", ([2, 3], [2, 3, 4], [8, 0, 0], "all")),
        ("text_config", "num_key_value_heads", (3, "2")),
        ("text_config", "sliding_window", (0, "4096")),
        (None, "image_token_id", (-1, 300, "4", None, True)),
        (None, "tie_word_embeddings", (1, "true")),
        (None, "text_config", ("qwen2", [])),
    ],
)
def test_what_is_not_computed_is_refused_by_name(part, field, values, tmp_path):
    assert parse_config(tmp_path, copy.deepcopy(WHOLE)).vision.features == 4 * 64
    flat = {key: value for key, value in WHOLE.items() if key != "text_config"} | SMALL
    assert parse_config(tmp_path, copy.deepcopy(flat)) == parse_config(tmp_path, copy.deepcopy(WHOLE))
    for value in values:
        for start in (WHOLE, flat):
            raw = copy.deepcopy(start)
            within = raw.get(part, raw) if part else raw
            if start is flat and (part, field) in (("text_config", "model_type"), (None, "text_config")):
                continue
            (within["rope_scaling"] if field == "mrope_section" else within)[field] = value
            message = refusal(parse_config, tmp_path, raw)
            assert field in message or field in ("hidden_size", "depth"), message
            assert "text_config" not in message or start is WHOLE or part == "vision_config", message


# ---- folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("newer", [False, True])
def test_folders_come_back_bit_for_bit(newer, tied, tmp_path):
    """Names as on the hub, where the fixture has them from, and as the module's own are since 4.52."""
    seen = set()

    def rename(name):
        if newer:
            name = re.sub("^model\\.", "model.language_model.", re.sub("^visual\\.", "model.visual.", name))
            name = name.replace("model.language_model.visual.", "model.visual.")
        seen.add(name)
        return name

    _, copied = round_trip(FIXTURES / "qwen2_5_vl", tmp_path, rename, tied)
    assert copied == 0
    older = {"visual.blocks.0.norm1.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"}
    assert not older & seen if newer else older <= seen


# ---- the tower -----------------------------------------------------------------------------------------


def test_axes_of_rotation_follow_each_other():
    axes = presets()["qwen2.5-vl-7b"].decoder.rope_axes
    assert axes == (0,) * 16 + (1,) * 24 + (2,) * 24
    assert presets()["llava-1.6-7b"].decoder.rope_axes == (0,) * 64


def test_layers_in_turn():
    stacks = Qwen25VisionConfig(hidden=8, mlp=8, layers=7, heads=1, out=8, full=(1, 2, 6, 9)).stacks
    assert stacks == ((False, 1), (True, 2), (False, 3), (True, 1))
    assert presets()["qwen2.5-vl-3b"].vision.stacks == ((False, 7), (True, 1)) * 4


GRIDS = [(3, 5), (2, 2), (1, 7), (4, 4)]  # cells of images: windows of 2 x 2 cells, some of them cut


@pytest.fixture(scope="module")
def pictured():
    """(patches, places) of two rows: three images and one, then padding."""
    layout = QwenLayout(2, 2, 2, 16, 1 << 20, window=2)
    rng, rows = np.random.default_rng(0), []
    for grids in (GRIDS[:3], GRIDS[3:]):
        made = [layout.patched(rng.standard_normal((4 * d * a, 24)), d, a) for d, a in grids]
        patches = np.concatenate([patches.reshape(-1, 12) for patches, _ in made])
        place = np.concatenate([place.reshape(-1, 2) for _, place in made])
        rows.append((padded(patches, 120), padded(place, 120, -1)))
    return tuple(np.stack(part) for part in zip(*rows, strict=True))


def test_windows_are_told_apart_by_the_places_of_their_patches(pictured):
    _, place = pictured
    images = images_of(jnp.asarray(place))
    windows = np.asarray(windows_of(jnp.asarray(place), images, 4))
    assert images[0].tolist() == [1] * 60 + [2] * 16 + [3] * 28 + [0] * 16
    sizes = [[16, 16, 8, 8, 8, 4], [16], [8, 8, 8, 4]]  # patches of each window, line by line of windows
    counted = [size for image in sizes for size in image]
    assert windows[0].tolist() == [i for i, n in enumerate(counted, 1) for _ in range(n)] + [0] * 16
    assert windows[1].tolist() == [i for i in (1, 2, 3, 4) for _ in range(16)] + [0] * 56


@pytest.mark.slow
def test_layers_with_windows_see_a_window_and_the_others_an_image(pictured):
    """What moves when a patch of another window, or of another image, is changed."""
    patches, place = (jnp.asarray(x) for x in pictured)
    reached = {}
    for full in ((), (0,)):
        config = Qwen25VisionConfig(
            hidden=8, mlp=8, layers=1, heads=1, out=8, patch_size=2, window=2, full=full
        )
        tower = Qwen25Tower(config)
        params = jax.jit(tower.init)(jax.random.key(0), patches, place)
        run = jax.jit(tower.apply)
        before, after = run(params, patches, place), run(params, patches.at[0, 17].add(1.0), place)
        reached[full] = np.flatnonzero(np.abs(after - before).max(-1)[0] > 1e-6).tolist()
    assert reached == {(): [4, 5, 6, 7], (0,): list(range(15))}
