"""InternVL3 and 3.5 folders: what is read, what is refused.

That they compute what transformers does is in test_parity.py, runs with them in test_family_runs.py, their
images in test_internvl_layout.py.
"""

import copy
import json
import math
import re

import pytest
from goldens import FIXTURES
from refusals import refusal
from roundtrip import round_trip

import mllm_align
from mllm_align.models.families.registry import parse_config, presets
from mllm_align.models.huggingface import open_folder
from mllm_align.plan.targets import sizes

WHOLE = {
    "model_type": "internvl",
    "image_token_id": 4,
    "text_config": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
    },
    "vision_config": {"hidden_size": 64, "num_attention_heads": 4, "image_size": 56, "patch_size": 14},
}

# ---- config.json ---------------------------------------------------------------------------------------

DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}


@pytest.mark.parametrize("vision", [None, {"image_size": [56, 56], "patch_size": [14, 14]}])
@pytest.mark.parametrize(
    "text",
    [
        None,
        {},
        {"model_type": "llama", "attention_bias": True},
        {"model_type": "qwen3", "attention_bias": True, "use_sliding_window": True},
        {"model_type": "qwen2", "rope_scaling": DYNAMIC, "rope_theta": 1e6, "tie_word_embeddings": False},
    ],
)
def test_what_is_left_out_means_what_it_means_to_transformers(vision, text, tmp_path):
    from transformers import InternVLConfig

    raw = {"model_type": "internvl", "image_token_id": 4, "vision_config": copy.deepcopy(vision)}
    raw["text_config"] = copy.deepcopy(text)
    ours = parse_config(tmp_path, copy.deepcopy(raw))
    theirs = InternVLConfig.from_dict(copy.deepcopy(raw))
    v, t, o, d = theirs.vision_config, theirs.text_config, ours.vision, ours.decoder
    assert (o.hidden, o.mlp, o.layers, o.heads, o.activation, o.norm_eps) == (
        v.hidden_size,
        v.intermediate_size,
        v.num_hidden_layers,
        v.num_attention_heads,
        v.hidden_act,
        v.layer_norm_eps,
    )
    assert ([o.image_size] * 2, [o.patch_size] * 2) == (list(v.image_size), list(v.patch_size))
    assert (o.qkv_bias, o.qk_norm, o.rms_norm) == (
        v.attention_bias,
        v.use_qk_norm,
        v.norm_type == "rms_norm",
    )
    assert (o.shuffle, ours.projector_activation) == (
        1 / theirs.downsample_ratio,
        theirs.projector_hidden_act,
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
    assert d.head_dim == (getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads)
    named = t.model_type
    assert (d.qkv_bias, d.o_bias) == ((True, False) if named == "qwen2" else (t.attention_bias,) * 2)
    assert d.qk_norm == (named == "qwen3") and not d.mlp_bias and d.rope_scaling is None
    assert d.rope_theta == t.rope_parameters["rope_theta"] and d.tied is theirs.tie_word_embeddings is True
    slides = "sliding_attention" in (getattr(t, "layer_types", None) or ())
    assert d.max_length == (t.sliding_window if slides else t.max_position_embeddings)
    raw.pop("image_token_id")
    if t.vocab_size > 151667:
        assert parse_config(tmp_path, raw).image_token == InternVLConfig().image_token_id


# What published folders say, but for what nothing reads.
TOWER = {"model_type": "internvl_vision", "attention_bias": True, "use_qk_norm": False}
TOWER |= {"norm_type": "layer_norm", "image_size": [448, 448], "patch_size": [14, 14]}
LARGE = TOWER | {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"}
LARGE |= {"hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25}
LARGE |= {"num_hidden_layers": 45}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1000000.0, "rope_scaling": DYNAMIC, "vocab_size": 151674}
QWEN2 |= {"max_position_embeddings": 32768, "max_window_layers": 70, "sliding_window": None}
QWEN3 = {"model_type": "qwen3", "rope_theta": 1000000, "rope_scaling": None, "vocab_size": 151936}
QWEN3 |= {"max_position_embeddings": 40960, "head_dim": 128}
PUBLISHED = {
    "internvl3-1b": (TOWER, QWEN2, (896, 4864, 24, 14, 2)),
    "internvl3-8b": (TOWER, QWEN2, (3584, 18944, 28, 28, 4)),
    "internvl3-78b": (LARGE, QWEN2, (8192, 29568, 80, 64, 8)),
    "internvl3.5-4b": (TOWER, QWEN3, (2560, 9728, 36, 32, 8)),
}
NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NUMBERS += ("num_key_value_heads",)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name, tmp_path):
    tower, text, numbers = PUBLISHED[name]
    raw = {"model_type": "internvl", "image_token_id": presets()[name].image_token, "vision_config": tower}
    raw |= {"image_seq_length": 256, "downsample_ratio": 0.5, "tie_word_embeddings": False}
    raw["text_config"] = text | dict(zip(NUMBERS, numbers, strict=True))
    assert parse_config(tmp_path, raw) == presets()[name]
    planned = sizes(mllm_align.Config(), presets()[name]).shape
    assert (planned.tiles, planned.prefix) == (13, 3456)


def test_blocks_after_the_feature_layer_do_not_run(tmp_path):
    assert parse_config(tmp_path, WHOLE).vision.layers == 24
    assert parse_config(tmp_path, WHOLE | {"vision_feature_layer": -3}).vision.layers == 22


SIZES = (0, -4, 10**9, "64", None, [64], True, 64.0, math.nan)


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("vision_config", "hidden_size", SIZES),
        ("vision_config", "image_size", (*SIZES, [56, 28], [56] * 3, ["56", "56"])),
        ("vision_config", "patch_size", (*SIZES, [14, 7])),
        ("vision_config", "hidden_act", ("relu", None)),
        ("vision_config", "model_type", ("siglip_vision_model", None)),
        ("vision_config", "num_channels", (1, None)),
        ("vision_config", "attention_bias", (1, None)),
        ("vision_config", "use_qk_norm", ("yes", None)),
        ("vision_config", "norm_type", ("batch_norm", None)),
        ("vision_config", "use_absolute_position_embeddings", (False, None)),
        ("vision_config", "use_mean_pooling", (False, None)),
        ("text_config", "model_type", ("gpt_oss", "qwen3_moe", "internlm2", None)),
        ("text_config", "rope_scaling", ({"type": "yarn"}, {"rope_type": "longrope"})),
        (None, "downsample_ratio", (0, 0.3, 2, "0.5", None, math.nan)),
        (None, "image_token_id", (-1, 300, "4", None, True)),
        (None, "tie_word_embeddings", (1, "true")),
        (None, "text_config", ("qwen2", [])),
        (None, "vision_feature_layer", (0, 25, -25, "x", None, True, [-1, -2])),
        (None, "vision_feature_select_strategy", ("full", None)),
        (None, "projector_hidden_act", ("silu",)),
    ],
)
def test_what_is_not_computed_is_refused_by_name(part, field, values, tmp_path):
    assert parse_config(tmp_path, copy.deepcopy(WHOLE)).vision.tokens == 4
    for value in values:
        raw = copy.deepcopy(WHOLE)
        (raw[part] if part else raw)[field] = value
        message = refusal(parse_config, tmp_path, raw)
        assert field in message or field in ("hidden_size", "image_size", "patch_size"), message


def test_cells_fill_a_tile(tmp_path):
    raw = copy.deepcopy(WHOLE)
    raw["vision_config"]["image_size"] = 42
    assert "a divisor of the 3 patches a side" in refusal(parse_config, tmp_path, raw)


# ---- folders -------------------------------------------------------------------------------------------


def test_the_original_layout_is_refused_with_the_folder_to_take(tmp_path):
    raw = {"model_type": "internvl_chat", "llm_config": {}, "vision_config": {}}
    assert "OpenGVLab/InternVL3-8B-hf" in refusal(parse_config, tmp_path, raw)
    index = {"weight_map": {"mlp1.0.weight": "a.safetensors"}}
    (tmp_path / "config.json").write_text(json.dumps(WHOLE))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "a.safetensors").touch()
    assert "original InternVL" in refusal(open_folder, tmp_path)


def later(name):
    """As transformers names them within the model's class since 4.52."""
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return "lm_head.weight" if name == "language_model.lm_head.weight" else f"model.{name}"


@pytest.mark.parametrize("rename", [later, lambda name: name], ids=["4.52", "published"])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_come_back_bit_for_bit(rename, tied, tmp_path):
    _, copied = round_trip(FIXTURES / "internvl", tmp_path, rename, tied)
    assert copied == 0
