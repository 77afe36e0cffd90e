"""config.json: defaults are transformers' own, and every number has a range."""

import copy
import json
import math

import pytest
from refusals import refusal

from mllm_align.errors import InputError
from mllm_align.models.families.registry import parse_config, read_config

CLIP = {"hidden_size": 64, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
WHOLE = {
    "model_type": "llava_next",
    "image_token_index": 4,
    "image_grid_pinpoints": [[56, 112], [112, 56]],
    "text_config": {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300},
    "vision_config": CLIP,
}


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("vision", [None, {}, CLIP])
@pytest.mark.parametrize(
    "text", [None, {}, {"model_type": "llama"}, {"model_type": "mistral"}, {"head_dim": 8, "rope_theta": 5}]
)
def test_what_is_left_out_means_what_it_means_to_transformers(kind, vision, text, tmp_path):
    from transformers import LlavaConfig, LlavaNextConfig

    raw = {"model_type": kind, "vision_config": vision, "text_config": text, "image_token_index": 4}
    if vision == {} and kind == "llava_next":
        raw["image_grid_pinpoints"] = [[448, 224]]  # the tile has 224 pixels then
    ours = parse_config(tmp_path, copy.deepcopy(raw))
    theirs = (LlavaNextConfig if kind == "llava_next" else LlavaConfig).from_dict(raw)
    v, t = theirs.vision_config, theirs.text_config
    assert (ours.vision.hidden, ours.vision.mlp, ours.vision.heads) == (
        v.hidden_size,
        v.intermediate_size,
        v.num_attention_heads,
    )
    assert ours.vision.layers == v.num_hidden_layers + 1 + theirs.vision_feature_layer
    assert (ours.vision.image_size, ours.vision.patch_size) == (v.image_size, v.patch_size)
    assert (ours.vision.activation, ours.vision.norm_eps) == (v.hidden_act, v.layer_norm_eps)
    d = ours.decoder
    assert (d.vocab, d.hidden, d.mlp, d.layers, d.heads, d.kv_heads, d.head_dim) == (
        t.vocab_size,
        t.hidden_size,
        t.intermediate_size,
        t.num_hidden_layers,
        t.num_attention_heads,
        t.num_key_value_heads,
        t.head_dim,
    )
    assert (d.norm_eps, d.rope_theta) == (t.rms_norm_eps, t.rope_parameters["rope_theta"])
    window = getattr(t, "sliding_window", None) or t.max_position_embeddings
    assert d.max_length == min(window, t.max_position_embeddings)
    assert ours.projector_activation == theirs.projector_hidden_act
    assert ours.projector_bias == theirs.multimodal_projector_bias
    pinpoints = getattr(theirs, "image_grid_pinpoints", ())
    assert ours.pinpoints == tuple(map(tuple, pinpoints))


SIZES = (0, -4, 10**9, 10**400, "64", None, [64], True, 64.0, math.nan)
REALS = (0, -1e-5, math.nan, math.inf, "1e-5", None, [1e-5], True)


@pytest.mark.parametrize(
    "part, field, values",
    [
        *(
            (part, field, SIZES)
            for part, fields in {
                "text_config": "vocab_size hidden_size intermediate_size num_hidden_layers "
                "num_attention_heads max_position_embeddings",
                "vision_config": "hidden_size intermediate_size num_hidden_layers num_attention_heads "
                "image_size patch_size",
            }.items()
            for field in fields.split()
            if field != "max_position_embeddings"
        ),
        ("text_config", "max_position_embeddings", (0, -4, "64", None, True, 10**400)),
        ("text_config", "num_key_value_heads", (0, -4, 3, 8, 10**9, "4", True)),
        ("text_config", "head_dim", (0, -4, 7, 10**9, "4", True)),
        ("text_config", "sliding_window", (0, -4, "4", True)),
        ("text_config", "rms_norm_eps", (*REALS, 1, 2)),
        ("vision_config", "layer_norm_eps", (*REALS, 1, 2)),
        ("text_config", "rope_theta", (*REALS, 10**400)),
        ("text_config", "rope_parameters", ("default", [1], {"rope_theta": "x"}, {"rope_theta": math.nan})),
        ("text_config", "partial_rotary_factor", (0.5, "x")),
        ("text_config", "attention_bias", (1, "true", None)),
        ("vision_config", "num_channels", (1, 4, None)),
        (None, "image_token_index", (-1, 300, 10**9, "4", None, True)),
        (None, "vision_feature_layer", (0, 13, -14, "x", None, True, [-2], 10**400)),
        (None, "multimodal_projector_bias", (1, "true", None)),
        (None, "tie_word_embeddings", (1, "true")),
        (None, "text_config", ("llama", [])),
        (None, "image_grid_pinpoints", ([], [[56]], [[56, 57]], [[0, 56]], [[56, 5600]], [["56", 56]], 56)),
    ],
)
def test_numbers_out_of_range(part, field, values, tmp_path):
    assert parse_config(tmp_path, copy.deepcopy(WHOLE)).decoder.vocab == 300
    for value in values:
        raw = copy.deepcopy(WHOLE)
        (raw[part] if part else raw)[field] = value
        message = refusal(parse_config, tmp_path, raw)
        assert field in message or field == "hidden_size", message


def test_layers_without_end_are_refused_at_once(tmp_path):
    """Nothing loops over them, whatever is asked."""
    raw = WHOLE | {"text_config": WHOLE["text_config"] | {"num_hidden_layers": 10**9}, "num_labels": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        InputError, match=r"text_config.num_hidden_layers is 1000000000, wanted .* 1 to 1024"
    ):
        read_config(tmp_path)


def test_rotary_rules_for_each_kind_of_layer_are_not_taken_for_one(tmp_path):
    raw = copy.deepcopy(WHOLE)
    raw["text_config"]["rope_parameters"] = {"full_attention": {"rope_theta": 5.0}}
    assert "full_attention" in refusal(parse_config, tmp_path, raw)
