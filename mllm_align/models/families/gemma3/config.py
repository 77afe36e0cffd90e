"""Gemma 3's config.json: every field that is read, its range, and its default.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm_align.models.config import DecoderConfig, LinearRope, LocalLayers, ModelConfig
from mllm_align.models.families import vit
from mllm_align.models.families.siglip import SiglipConfig
from mllm_align.models.ranges import (
    DEPTH,
    EPS,
    FLAG,
    HEADS,
    PIXELS,
    WIDTH,
    Between,
    Listed,
    Maybe,
    Object,
    OneOf,
    Whole,
    check,
    check_token,
    fields,
    wrong,
)

COPY = "take a Gemma 3 folder (4B, 12B or 27B), or copy the file again from where it came from"

WHOLE = {
    "image_token_index": (262144, Whole(0, 1 << 31)),
    "mm_tokens_per_image": (256, Whole(1, 1 << 16)),
    "tie_word_embeddings": (True, Maybe(FLAG)),
    "text_config": (None, Maybe(Object())),
    "vision_config": (None, Maybe(Object())),
}
VISION = {
    "model_type": ("siglip_vision_model", OneOf(("siglip_vision_model",))),
    "hidden_act": ("gelu_pytorch_tanh", OneOf(("gelu_pytorch_tanh", "gelu", "quick_gelu"))),
    "hidden_size": (768, WIDTH),
    "intermediate_size": (3072, WIDTH),
    "num_hidden_layers": (12, DEPTH),
    "num_attention_heads": (12, HEADS),
    "num_channels": (3, OneOf((3,))),
    "image_size": (224, PIXELS),
    "patch_size": (16, PIXELS),
    "layer_norm_eps": (1e-6, EPS),
}
SLIDING, FULL = "sliding_attention", "full_attention"
TEXT = {
    "model_type": ("gemma3_text", OneOf(("gemma3_text",))),
    "hidden_activation": ("gelu_pytorch_tanh", OneOf(("gelu_pytorch_tanh", "gelu", "silu"))),
    "vocab_size": (262208, WIDTH),
    "hidden_size": (2304, WIDTH),
    "intermediate_size": (9216, WIDTH),
    "num_hidden_layers": (26, DEPTH),
    "num_attention_heads": (8, HEADS),
    "num_key_value_heads": (4, HEADS),
    "head_dim": (256, Whole(2, 1 << 14)),
    "max_position_embeddings": (131072, Whole(1, 1 << 31)),
    "rms_norm_eps": (1e-6, EPS),
    "attention_bias": (False, FLAG),
    "query_pre_attn_scalar": (256, Between(0, 1e9)),
    "sliding_window": (4096, Whole(1, 1 << 31)),
    "sliding_window_pattern": (6, Whole(1, DEPTH.high)),
    "layer_types": (None, Maybe(Listed(Whole(1, DEPTH.high), OneOf((SLIDING, FULL))))),
    "use_bidirectional_attention": (False, OneOf((False, None))),
    "attn_logit_softcapping": (None, OneOf((None,))),
    "final_logit_softcapping": (None, OneOf((None,))),
    "rope_parameters": (None, Maybe(Object())),
    "rope_scaling": (None, Maybe(Object())),
}
THETA = Between(0, 1e18)
THETAS = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}
"""Of each kind of layers the field of older folders, and the default."""
KINDS = {FULL: ("default", "linear"), SLIDING: ("default",)}


@dataclass(frozen=True)
class Gemma3Config(ModelConfig):
    vision: SiglipConfig


def parse_config(path: Path, raw: dict[str, Any]) -> Gemma3Config:
    """raw: the value of config.json. Raises InputError for a value that is out of range, and for what is
    not computed here."""
    at = f"{path}/config.json"
    whole = fields(at, raw, WHOLE, COPY)
    vision = _vision(at, whole["vision_config"] or {}, whole["mm_tokens_per_image"])
    text = whole["text_config"] or {}
    decoder = _decoder(at, text, bool(whole["tie_word_embeddings"]), vision.tokens)
    check_token(at, whole, "image_token_index", decoder.vocab, COPY)
    return Gemma3Config(raw["model_type"], vision, decoder, whole["image_token_index"])


def _vision(at: str, given: dict[str, Any], tokens: int) -> SiglipConfig:
    config, side = SiglipConfig(**vit.settings(at, given, VISION, COPY)), math.isqrt(tokens)
    if side**2 != tokens or config.side % side:
        wanted = f"the square of a divisor of the {config.side} patches a side"
        raise wrong(at, "mm_tokens_per_image", tokens, wanted, COPY)
    return replace(config, pool=config.side // side)


def _decoder(at: str, given: dict[str, Any], tied: bool, image_block: int) -> DecoderConfig:
    under = "text_config."
    t = fields(at, given, TEXT, COPY, under)
    heads, kv_heads, head_dim = t["num_attention_heads"], t["num_key_value_heads"], t["head_dim"]
    if heads % kv_heads:
        wanted = f"a divisor of the {heads} attention heads"
        raise wrong(at, f"{under}num_key_value_heads", kv_heads, wanted, COPY)
    if head_dim % 2:
        raise wrong(at, f"{under}head_dim", head_dim, "an even size of head", COPY)
    theta, scaling = _rope(at, given, FULL)
    local_theta, _ = _rope(at, given, SLIDING)
    layers = _local(at, t)
    return DecoderConfig(
        vocab=t["vocab_size"],
        hidden=t["hidden_size"],
        mlp=t["intermediate_size"],
        layers=t["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        local=LocalLayers(layers, t["sliding_window"], local_theta) if any(layers) else None,
        image_block=image_block,
        activation=t["hidden_activation"],
        query_scale=math.sqrt(head_dim / t["query_pre_attn_scalar"]),
        scaled_embedding=True,
        norm_eps=float(t["rms_norm_eps"]),
        norm_offset=1.0,
        post_norms=True,
        qkv_bias=t["attention_bias"],
        o_bias=t["attention_bias"],
        qk_norm=True,
        tied=tied,
        max_length=t["max_position_embeddings"],
    )


def _local(at: str, text: dict[str, Any]) -> tuple[bool, ...]:
    """For each layer whether it has a window: all but every sixth, or as layer_types says."""
    count, types = text["num_hidden_layers"], text["layer_types"]
    if types is None:
        return tuple((i + 1) % text["sliding_window_pattern"] != 0 for i in range(count))
    if len(types) != count:
        wanted = f"one for each of the {count} layers"
        raise wrong(at, "text_config.layer_types", f"a list of {len(types)}", wanted, COPY)
    return tuple(kind == SLIDING for kind in types)


def _rope(at: str, text: dict[str, Any], kind: str) -> tuple[float, LinearRope | None]:
    """Newer folders have the rules of both kinds of layers in rope_parameters; older ones both thetas side
    by side, and the global layers' rule in rope_scaling."""
    nested = text.get("rope_parameters") or {}
    where, (name, theta) = f"text_config.rope_parameters.{kind}", THETAS[kind]
    check(at, where, nested.get(kind), Maybe(Object()), COPY)
    rule = dict(nested.get(kind) or {})
    if kind == FULL and text.get("rope_scaling"):
        rule, where = rule | text["rope_scaling"], "text_config.rope_scaling"
    theta = check(at, f"text_config.{name}", text.get(name, theta), THETA, COPY)
    table = {
        "rope_theta": (theta, THETA),
        "type": ("default", OneOf(KINDS[kind])),
        "rope_type": ("default", OneOf(KINDS[kind])),
        "partial_rotary_factor": (1.0, OneOf((1, 1.0))),
    }
    found = fields(at, rule, table, COPY, f"{where}.")
    if "linear" not in (found["rope_type"], found["type"]):
        return float(found["rope_theta"]), None
    factor = check(at, f"{where}.factor", rule.get("factor"), Between(0, 1e6), COPY)
    return float(found["rope_theta"]), LinearRope(float(factor))
