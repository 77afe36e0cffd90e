"""The text_config of Llama-family decoders: every field that is read, its range, and its default.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

from typing import Any

from mllm_align.models.config import DecoderConfig, Llama3Rope
from mllm_align.models.ranges import (
    DEPTH,
    EPS,
    FLAG,
    HEADS,
    WIDTH,
    Between,
    Listed,
    Maybe,
    Object,
    OneOf,
    Whole,
    check,
    fields,
    wrong,
)

LLAMA = {
    "model_type": ("llama", OneOf(("llama", "mistral", "qwen2", "qwen3"))),
    "hidden_act": ("silu", OneOf(("silu",))),
    "vocab_size": (32000, WIDTH),
    "hidden_size": (4096, WIDTH),
    "intermediate_size": (11008, WIDTH),
    "num_hidden_layers": (32, DEPTH),
    "num_attention_heads": (32, HEADS),
    "num_key_value_heads": (None, Maybe(HEADS)),
    "head_dim": (None, Maybe(Whole(2, 1 << 14))),
    "max_position_embeddings": (2048, Whole(1, 1 << 31)),
    "sliding_window": (None, Maybe(Whole(1, 1 << 31))),
    "rms_norm_eps": (1e-6, EPS),
    "attention_bias": (False, FLAG),
    "mlp_bias": (False, FLAG),
    "tie_word_embeddings": (False, Maybe(FLAG)),
    "partial_rotary_factor": (None, Maybe(OneOf((1, 1.0)))),
    "rope_parameters": (None, Maybe(Object())),
    "rope_scaling": (None, Maybe(Object())),
}
MISTRAL = {
    "intermediate_size": (14336, WIDTH),
    "num_key_value_heads": (8, Maybe(HEADS)),
    "max_position_embeddings": (131072, Whole(1, 1 << 31)),
    "sliding_window": (4096, Maybe(Whole(1, 1 << 31))),
}
QWEN2 = {
    "vocab_size": (151936, WIDTH),
    "intermediate_size": (22016, WIDTH),
    "num_key_value_heads": (32, Maybe(HEADS)),
    "max_position_embeddings": (32768, Whole(1, 1 << 31)),
    "use_sliding_window": (False, FLAG),
    "sliding_window": (4096, Maybe(Whole(1, 1 << 31))),
    "max_window_layers": (28, Whole(0, 1 << 31)),
    "layer_types": (
        None,
        Maybe(Listed(Whole(1, DEPTH.high), OneOf(("full_attention", "sliding_attention")))),
    ),
}
QWEN3 = QWEN2 | {"head_dim": (128, Maybe(Whole(2, 1 << 14)))}
KINDS = {"mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
RULES = OneOf(("default", "llama3", "dynamic"))  # up to the max_length, the dynamic rule is the default one
ROPE = {
    "type": ("default", RULES),
    "rope_type": ("default", RULES),
    "rope_theta": (10000.0, Between(0, 1e18)),
    "partial_rotary_factor": (None, Maybe(OneOf((1, 1.0)))),
}
LLAMA3 = {
    "factor": (None, Between(0, 1e6)),
    "low_freq_factor": (None, Between(0, 1e6)),
    "high_freq_factor": (None, Between(0, 1e6)),
    "original_max_position_embeddings": (None, Whole(1, 1 << 31)),
}


def decoder_config(
    at: str, given: dict[str, Any], remedy: str, under: str = "text_config."
) -> DecoderConfig:
    """given: the value of text_config. at, remedy, under: the file, what to do and what fields are called
    there, for messages.

    Raises InputError for a value out of range, and for what is not computed.
    """
    kind = given.get("model_type")
    t = fields(at, given, LLAMA | KINDS.get(str(kind), {}), remedy, under)
    qwen2, qwen3 = kind == "qwen2", kind == "qwen3"
    heads = t["num_attention_heads"]
    kv_heads = t["num_key_value_heads"] or heads
    if heads % kv_heads:
        wanted = f"a divisor of the {heads} attention heads"
        raise wrong(at, f"{under}num_key_value_heads", kv_heads, wanted, remedy)
    head_dim, left = (t["head_dim"], 0) if t["head_dim"] else divmod(t["hidden_size"], heads)
    if left or head_dim % 2 or not head_dim:
        wanted = f"an even size of head; hidden_size / num_attention_heads is {t['hidden_size']} / {heads}"
        raise wrong(at, f"{under}head_dim", t["head_dim"], wanted, remedy)
    theta, scaling = _rope(at, given, remedy, under)
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
        norm_eps=float(t["rms_norm_eps"]),
        qkv_bias=t["attention_bias"] or qwen2,
        o_bias=t["attention_bias"] and not qwen2,
        mlp_bias=t["mlp_bias"] and not (qwen2 or qwen3),
        qk_norm=qwen3,
        tied=bool(t["tie_word_embeddings"]),
        # within the window a sliding mask is the full one; longer records are refused
        max_length=min(_window(t) or t["max_position_embeddings"], t["max_position_embeddings"]),
    )


def _window(text: dict[str, Any]) -> int | None:
    """Tokens that some layer looks back; None where all layers see everything."""
    if "use_sliding_window" not in text:
        return text["sliding_window"]
    types, later = text["layer_types"], text["num_hidden_layers"] > text["max_window_layers"]
    slides = later if types is None else "sliding_attention" in types
    return text["sliding_window"] if text["use_sliding_window"] and slides else None


def _rope(at: str, text: dict[str, Any], remedy: str, under: str) -> tuple[float, Llama3Rope | None]:
    """Newer folders have all of it in rope_parameters, older ones theta beside rope_scaling."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    where = f"{under}rope_scaling." if text.get("rope_scaling") else f"{under}rope_parameters."
    outer = text.get("rope_theta", 10000.0)
    nested = next((name for name, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise wrong(at, where + nested, rope[nested], "one rule for all layers", remedy)
    check(at, f"{under}rope_theta", outer, ROPE["rope_theta"][1], remedy)
    found = fields(at, {"rope_theta": outer, **rope}, ROPE, remedy, where)
    theta = float(found["rope_theta"])
    if "llama3" not in (found["type"], found["rope_type"]):
        return theta, None
    s = fields(at, rope, LLAMA3, remedy, where)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    if low >= high:
        raise wrong(at, f"{where}low_freq_factor", low, f"less than the high_freq_factor {high}", remedy)
    return theta, Llama3Rope(s["factor"], low, high, s["original_max_position_embeddings"])
