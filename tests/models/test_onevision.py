"""LLaVA-OneVision folders: what is read, what is refused.

That they compute what transformers does is in test_parity.py, runs with them in test_family_runs.py, their
images in test_onevision_layout.py.
"""

import copy
import math
import re

import pytest
from goldens import FIXTURES
from refusals import refusal
from roundtrip import round_trip

import mllm_align
from mllm_align.models.families.registry import parse_config, presets
from mllm_align.plan.targets import sizes

WHOLE = {
    "model_type": "llava_onevision",
    "image_token_index": 4,
    "image_grid_pinpoints": [[56, 112], [112, 56]],
    "text_config": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    },
    "vision_config": {"hidden_size": 64, "num_attention_heads": 4, "image_size": 56, "patch_size": 14},
}

# ---- config.json ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [None, WHOLE["vision_config"]])
@pytest.mark.parametrize(
    "text",
    [
        None,
        {},
        {"model_type": "llama"},
        {"rope_theta": 1e6, "tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
    ],
)
def test_what_is_left_out_means_what_it_means_to_transformers(vision, text, tmp_path):
    from transformers import LlavaOnevisionConfig

    raw = {"model_type": "llava_onevision", "image_token_index": 4, "vision_config": vision}
    raw["text_config"] = copy.deepcopy(text)
    if vision is not None:
        raw["image_grid_pinpoints"] = [[56, 112]]
    ours = parse_config(tmp_path, copy.deepcopy(raw))
    theirs = LlavaOnevisionConfig.from_dict(copy.deepcopy(raw))
    v, t, d = theirs.vision_config, theirs.text_config, ours.decoder
    assert (ours.vision.hidden, ours.vision.mlp, ours.vision.layers, ours.vision.heads) == (
        v.hidden_size,
        v.intermediate_size,
        v.num_hidden_layers,
        v.num_attention_heads,
    )
    assert (ours.vision.image_size, ours.vision.patch_size) == (v.image_size, v.patch_size)
    assert (ours.vision.activation, ours.vision.norm_eps) == (v.hidden_act, v.layer_norm_eps)
    assert (d.vocab, d.hidden, d.mlp, d.layers, d.heads, d.kv_heads, d.norm_eps) == (
        t.vocab_size,
        t.hidden_size,
        t.intermediate_size,
        t.num_hidden_layers,
        t.num_attention_heads,
        t.num_key_value_heads,
        t.rms_norm_eps,
    )
    qwen2 = t.model_type == "qwen2"
    assert (d.qkv_bias, d.o_bias, d.mlp_bias) == (qwen2, False, False)
    assert d.rope_theta == t.rope_parameters["rope_theta"] and d.tied is theirs.tie_word_embeddings
    slides = "sliding_attention" in (t.layer_types if qwen2 else ())
    assert d.max_length == (64 if slides else t.max_position_embeddings)
    assert ours.pinpoints == tuple(map(tuple, theirs.image_grid_pinpoints))
    assert f"anyres_max_{ours.most}" == theirs.vision_aspect_ratio
    assert (ours.projector_activation, ours.projector_bias) == (
        theirs.projector_hidden_act,
        theirs.multimodal_projector_bias,
    )
    raw.pop("image_token_index")
    if t.vocab_size > 151646:
        assert parse_config(tmp_path, raw).image_token == LlavaOnevisionConfig().image_token_id


# What the published folders say, but for what nothing reads.
TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "image_size": 384}
TOWER |= {"patch_size": 14, "num_attention_heads": 16, "model_type": "siglip_vision_model"}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1000000.0, "max_position_embeddings": 32768}
PUBLISHED = {
    "llava-onevision-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    | {"vocab_size": 152000, "max_window_layers": 24},
    "llava-onevision-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152128},
    "llava-onevision-72b": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152128, "max_window_layers": 80},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name, tmp_path):
    raw = {"model_type": "llava_onevision", "image_token_index": 151646, "vision_config": TOWER}
    raw |= {"vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"}
    assert parse_config(tmp_path, raw | {"text_config": QWEN2 | PUBLISHED[name]}) == presets()[name]
    planned = sizes(mllm_align.Config(), presets()[name])
    assert planned.shape.tiles == 37, "six by six, and the whole image"


def test_blocks_after_the_feature_layer_do_not_run(tmp_path):
    assert parse_config(tmp_path, WHOLE).vision.layers == 12
    assert parse_config(tmp_path, WHOLE | {"vision_feature_layer": -3}).vision.layers == 10
    assert parse_config(tmp_path, WHOLE | {"vision_feature_layer": 5}).vision.layers == 5


SIZES = (0, -4, 10**9, "64", None, [64], True, 64.0, math.nan)


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("vision_config", "hidden_size", SIZES),
        ("vision_config", "num_hidden_layers", SIZES),
        ("vision_config", "patch_size", SIZES),
        ("vision_config", "num_attention_heads", (*SIZES, 3)),
        ("vision_config", "image_size", (*SIZES, [56, 56])),
        ("vision_config", "hidden_act", ("relu", None)),
        ("vision_config", "model_type", ("clip_vision_model", None)),
        ("vision_config", "num_channels", (1, None)),
        ("text_config", "model_type", ("gemma", None, ["qwen2"])),
        ("text_config", "hidden_act", ("gelu",)),
        ("text_config", "rope_scaling", ({"type": "yarn"}, {"rope_type": "longrope"})),
        ("text_config", "use_sliding_window", (1, None)),
        ("text_config", "layer_types", (["chunked_attention"], "full_attention", [])),
        ("text_config", "max_window_layers", (-1, None, "4")),
        (None, "image_token_index", (-1, 300, "4", None, True)),
        (None, "tie_word_embeddings", (1, "true")),
        (None, "text_config", ("qwen2", [])),
        (None, "vision_feature_layer", (0, 13, -13, "x", None, True, [-1, -2])),
        (None, "vision_feature_select_strategy", ("default", None)),
        (None, "vision_aspect_ratio", ("anyres", "anyres_max_", "anyres_max_0", "pad", 9, None)),
        (None, "image_grid_pinpoints", ([], [[56]], [[56, 57]], [[0, 56]], "56")),
        (None, "multimodal_projector_bias", (1, None)),
        (None, "projector_hidden_act", ("silu",)),
    ],
)
def test_what_is_not_computed_is_refused_by_name(part, field, values, tmp_path):
    assert parse_config(tmp_path, copy.deepcopy(WHOLE)).vision.tokens == 16
    for value in values:
        raw = copy.deepcopy(WHOLE)
        (raw[part] if part else raw)[field] = value
        message = refusal(parse_config, tmp_path, raw)
        assert field in message or field == "hidden_size", message


# ---- folders -------------------------------------------------------------------------------------------


def published(name):
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def later(name):
    """As transformers wrote it from 4.52 on."""
    name = re.sub(r"^language_model\.model\.", "language_model.", published(name))
    return "lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{name}"


@pytest.mark.parametrize("rename", [published, later, lambda name: name], ids=["hub", "4.52", "5"])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_come_back_bit_for_bit(rename, tied, tmp_path):
    """But for the norm after the last block, which no feature passes, all is read."""
    _, copied = round_trip(FIXTURES / "onevision", tmp_path, rename, tied)
    assert copied == 2
