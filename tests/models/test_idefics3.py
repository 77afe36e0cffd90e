"""Idefics3 and SmolVLM folders: what is read, what is refused.

That they compute what transformers does is in test_parity.py, runs with them in test_family_runs.py, their
images in test_idefics3_layout.py.
"""

import copy
import math

import pytest
from goldens import FIXTURES
from refusals import refusal
from roundtrip import round_trip

import mllm_align
from mllm_align.models.families.idefics3.vision import exact_places
from mllm_align.models.families.registry import parse_config, presets
from mllm_align.plan.targets import sizes

FOLDER = FIXTURES / "idefics3"
WHOLE = {
    "model_type": "idefics3",
    "image_token_id": 4,
    "text_config": {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300},
    "vision_config": {"hidden_size": 64, "num_attention_heads": 4, "image_size": 56, "patch_size": 14},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# ---- config.json ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("vision", [None, WHOLE["vision_config"]])
@pytest.mark.parametrize("text", [None, {}, {"model_type": "mistral"}, {"rope_parameters": LLAMA3}])
def test_what_is_left_out_means_what_it_means_to_transformers(kind, vision, text, tmp_path):
    from transformers import Idefics3Config, SmolVLMConfig

    raw = {"model_type": kind, "image_token_id": 4, "vision_config": vision}
    raw["text_config"] = copy.deepcopy(text)  # transformers writes into it
    raw["scale_factor"] = 7 if vision is None else 2  # of 7 and 4 patches a side
    ours = parse_config(tmp_path, copy.deepcopy(raw))
    theirs = {"idefics3": Idefics3Config, "smolvlm": SmolVLMConfig}[kind].from_dict(copy.deepcopy(raw))
    v, t, d = theirs.vision_config, theirs.text_config, ours.decoder
    assert (ours.vision.hidden, ours.vision.mlp, ours.vision.layers, ours.vision.heads) == (
        v.hidden_size,
        v.intermediate_size,
        v.num_hidden_layers,
        v.num_attention_heads,
    )
    assert (ours.vision.image_size, ours.vision.patch_size) == (v.image_size, v.patch_size)
    assert (ours.vision.activation, ours.vision.norm_eps) == (v.hidden_act, v.layer_norm_eps)
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
    assert d.rope_theta == t.rope_parameters["rope_theta"] and d.tied is theirs.tie_word_embeddings is False
    assert (d.rope_scaling is None) == (t.rope_parameters["rope_type"] == "default")
    raw.pop("image_token_id"), raw.pop("scale_factor")
    assert Idefics3Config.from_dict(raw).scale_factor == parse_config(tmp_path, WHOLE).vision.shuffle == 2


# What the published folders say, but for what nothing reads.
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}
SMOL = {"vocab_size": 49280, "rope_theta": 100000, "rms_norm_eps": 1e-05, "max_position_embeddings": 8192}
PUBLISHED = {
    "smolvlm-256m": (
        {"image_token_id": 49190, "scale_factor": 4, "vision_config": BASE},
        SMOL
        | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64}
        | {"num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "smolvlm-500m": (
        {"image_token_id": 49190, "scale_factor": 4, "vision_config": BASE},
        SMOL
        | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "head_dim": 64}
        | {"num_attention_heads": 15, "num_key_value_heads": 5},
    ),
    "smolvlm-2.2b": (
        {"image_token_id": 49153, "scale_factor": 3, "vision_config": SO400M | {"image_size": 384}},
        {"vocab_size": 49155, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
        | {"rope_theta": 273768.0, "rms_norm_eps": 1e-05, "max_position_embeddings": 16384},
    ),
    "idefics3-8b": (
        {"vision_config": SO400M | {"image_size": 364}},
        {"vocab_size": 128259, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-05}
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name, tmp_path):
    whole, text = PUBLISHED[name]
    raw = {"model_type": "idefics3", "text_config": text | {"model_type": "llama"}, **whole}
    assert parse_config(tmp_path, raw) == presets()[name]
    assert parse_config(tmp_path, raw | {"model_type": "smolvlm"}).vision == presets()[name].vision
    tiles = sizes(mllm_align.Config(), presets()[name]).shape.tiles
    assert tiles == 17, "four by four, and the whole image"


SIZES = (0, -4, 10**9, "64", None, [64], True, 64.0, math.nan)


@pytest.mark.parametrize(
    "part, field, values",
    [
        ("vision_config", "hidden_size", SIZES),
        ("vision_config", "num_hidden_layers", SIZES),
        ("vision_config", "patch_size", SIZES),
        ("vision_config", "num_attention_heads", (*SIZES, 3)),
        ("vision_config", "image_size", (*SIZES, 532, [56, 56])),  # 38 patches a side
        ("vision_config", "hidden_act", ("relu", None)),
        ("vision_config", "layer_norm_eps", (0, 1, "1e-5", None)),
        ("vision_config", "num_channels", (1, None)),
        ("text_config", "hidden_act", ("gelu",)),
        ("text_config", "rope_scaling", ({"type": "yarn"}, LLAMA3 | {"factor": None})),
        ("text_config", "rope_parameters", (LLAMA3 | {"low_freq_factor": 4},)),
        (None, "scale_factor", (0, 3, 8, 2.0, None, True)),
        (None, "image_token_id", (-1, 300, "4", None, True)),
        (None, "tie_word_embeddings", (1, "true")),
        (None, "text_config", ("llama", [])),
    ],
)
def test_what_is_not_computed_is_refused_by_name(part, field, values, tmp_path):
    assert parse_config(tmp_path, WHOLE).vision.tokens == 4
    for value in values:
        raw = copy.deepcopy(WHOLE)
        (raw[part] if part else raw)[field] = value
        message = refusal(parse_config, tmp_path, raw)
        assert field in message or field == "hidden_size", message


def test_sides_whose_place_names_hang_on_rounding():
    """26, 27 and 32 patches are published; what is an even fraction is exact."""
    assert all(exact_places(side) for side in (1, 4, 14, 16, 24, 26, 27, 28, 32, 64))
    assert not any(exact_places(side) for side in (19, 25, 29, 31, 38, 54))


# ---- folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_come_back_bit_for_bit(prefix, tied, tmp_path):
    """Named as published or as the inner class saves them; see `round_trip`."""

    def rename(name):
        return prefix + name.removeprefix("model.") if name.startswith("model.") else name

    _, copied = round_trip(FOLDER, tmp_path, rename, tied)
    assert copied == 0
