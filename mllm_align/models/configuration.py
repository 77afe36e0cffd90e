"""A folder's config.json: every field that is read, its range, and what an absent one stands for.

The defaults are those of transformers' classes, which published folders leave out; a test compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import read_json
from mllm_align.models.config import DecoderConfig, LlavaConfig, VisionConfig
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

CONVERT = (
    "convert it with transformers' convert_llava_next_weights_to_hf.py (or convert_llava_weights_to_hf.py"
    " for 1.5), or take the same model from a llava-hf folder"
)
COPY = "take a LLaVA 1.5 or 1.6 folder, or copy the file again from where it came from"

PIXELS = Whole(1, 4096)
GELU = OneOf(("gelu", "quick_gelu"))
TILES = 64  # most of them along one side of an AnyRes canvas

WHOLE = {
    "image_token_index": (32000, Whole(0, 1 << 31)),
    "projector_hidden_act": ("gelu", GELU),
    "vision_feature_select_strategy": ("default", OneOf(("default", "full"))),
    "multimodal_projector_bias": (True, FLAG),
    "tie_word_embeddings": (False, Maybe(FLAG)),
    "text_config": (None, Maybe(Object())),
    "vision_config": (None, Maybe(Object())),
    "image_grid_pinpoints": (
        None,
        Maybe(Listed(Whole(1, 1024), Listed(Whole(2, 2), Whole(1, TILES * PIXELS.high)))),
    ),
}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
VISION = {
    "model_type": ("clip_vision_model", OneOf(("clip_vision_model",))),
    "hidden_act": ("quick_gelu", GELU),
    "hidden_size": (768, WIDTH),
    "intermediate_size": (3072, WIDTH),
    "num_hidden_layers": (12, DEPTH),
    "num_attention_heads": (12, HEADS),
    "num_channels": (3, OneOf((3,))),
    "image_size": (224, PIXELS),
    "patch_size": (32, PIXELS),
    "layer_norm_eps": (1e-5, EPS),
}
# A folder without any vision_config means CLIP ViT-L/14 at 336 pixels.
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAMA = {
    "model_type": ("llama", OneOf(("llama", "mistral"))),
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
ROPE = {
    "type": ("default", OneOf(("default",))),
    "rope_type": ("default", OneOf(("default",))),
    "rope_theta": (10000.0, Between(0, 1e18)),
    "partial_rotary_factor": (None, Maybe(OneOf((1, 1.0)))),
}


def read_config(path: str | Path) -> LlavaConfig:
    """What a folder's config.json says; weights need not be there.

    Raises InputError where it is missing, is no LLaVA's, or has a value that is out of range or asks for
    what is not computed here.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        problem = "this is no Hugging Face model folder: it has no config.json"
        raise refusal(str(path), problem, "give the path of a llava-hf folder with all its files")
    return parse_config(path, read_json(path / "config.json", "give the path of a llava-hf folder"))


def parse_config(path: Path, raw: dict[str, Any]) -> LlavaConfig:
    """raw: the value of config.json. Raises InputError as `read_config`."""
    kind = raw.get("model_type")
    if "mm_vision_tower" in raw or "mm_projector_type" in raw:
        raise InputError(f"{path} is in the original LLaVA (liuhaotian) layout; {CONVERT}")
    at = f"{path}/config.json"
    if kind not in OneOf(("llava", "llava_next")):
        problem = f"is no LLaVA 1.5 or 1.6 folder: config.json has model_type {one_line(repr(kind))}"
        raise InputError(one_line(f"{path} {problem}, wanted 'llava' or 'llava_next'", 2000))
    whole = fields(at, raw, WHOLE, COPY)
    anyres = kind == "llava_next"
    if anyres and whole["vision_feature_select_strategy"] != "default":
        strategy = whole["vision_feature_select_strategy"]
        raise wrong(at, "vision_feature_select_strategy", strategy, "'default' for LLaVA 1.6", COPY)
    vision = _vision(at, raw, whole)
    decoder = _decoder(at, whole, anyres)
    if whole["image_token_index"] >= decoder.vocab:
        wanted = f"an id within the vocabulary of {decoder.vocab}"
        raise wrong(at, "image_token_index", whole["image_token_index"], wanted, COPY)
    return LlavaConfig(
        vision=vision,
        decoder=decoder,
        image_token=whole["image_token_index"],
        projector_activation=whole["projector_hidden_act"],
        projector_bias=whole["multimodal_projector_bias"],
        pinpoints=_pinpoints(at, whole["image_grid_pinpoints"], vision.image_size) if anyres else (),
    )


def _vision(at: str, raw: dict[str, Any], whole: dict[str, Any]) -> VisionConfig:
    given = CLIP_L if whole["vision_config"] is None else whole["vision_config"]
    v = fields(at, given, VISION, COPY, "vision_config.")
    width, heads, blocks = v["hidden_size"], v["num_attention_heads"], v["num_hidden_layers"]
    if width % heads:
        raise wrong(at, "vision_config.num_attention_heads", heads, f"a divisor of the width {width}", COPY)
    if v["patch_size"] > v["image_size"]:
        wanted = f"at most the image_size {v['image_size']}"
        raise wrong(at, "vision_config.patch_size", v["patch_size"], wanted, COPY)
    layer = raw.get("vision_feature_layer", -2)
    # hidden_states[0] is the input of the first block
    run = blocks + 1 + layer if type(layer) is int and layer < 0 else layer
    if run not in Whole(1, blocks):
        wanted = f"one of the outputs of the {blocks} vision layers"
        raise wrong(at, "vision_feature_layer", layer, wanted, COPY)
    return VisionConfig(
        hidden=width,
        mlp=v["intermediate_size"],
        layers=run,
        heads=heads,
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        activation=v["hidden_act"],
        norm_eps=float(v["layer_norm_eps"]),
        keep_class_token=whole["vision_feature_select_strategy"] == "full",
    )


def _decoder(at: str, whole: dict[str, Any], anyres: bool) -> DecoderConfig:
    given, under = whole["text_config"] or {}, "text_config."
    table = LLAMA | (MISTRAL if given.get("model_type") == "mistral" else {})
    t = fields(at, given, table, COPY, under)
    heads = t["num_attention_heads"]
    kv_heads = t["num_key_value_heads"] or heads
    if heads % kv_heads:
        wanted = f"a divisor of the {heads} attention heads"
        raise wrong(at, f"{under}num_key_value_heads", kv_heads, wanted, COPY)
    head_dim, left = (t["head_dim"], 0) if t["head_dim"] else divmod(t["hidden_size"], heads)
    if left or head_dim % 2 or not head_dim:
        wanted = f"an even size of head; hidden_size / num_attention_heads is {t['hidden_size']} / {heads}"
        raise wrong(at, f"{under}head_dim", t["head_dim"], wanted, COPY)
    return DecoderConfig(
        vocab=t["vocab_size"],
        hidden=t["hidden_size"],
        mlp=t["intermediate_size"],
        layers=t["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(at, given, under),
        norm_eps=float(t["rms_norm_eps"]),
        attention_bias=t["attention_bias"],
        mlp_bias=t["mlp_bias"],
        # transformers takes the decoder's own flag in LLaVA 1.5 alone
        tied=bool(whole["tie_word_embeddings"] or (t["tie_word_embeddings"] and not anyres)),
        # within the window a sliding mask is the full one; longer records are refused
        max_length=min(t["sliding_window"] or t["max_position_embeddings"], t["max_position_embeddings"]),
    )


def _rope_theta(at: str, text: dict[str, Any], under: str) -> float:
    """Newer folders have it in rope_parameters, older ones beside rope_scaling."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    where = f"{under}rope_scaling." if text.get("rope_scaling") else f"{under}rope_parameters."
    outer = text.get("rope_theta", 10000.0)
    nested = next((name for name, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise wrong(at, where + nested, rope[nested], "one rule for all layers", COPY)
    check(at, f"{under}rope_theta", outer, ROPE["rope_theta"][1], COPY)
    return float(fields(at, {"rope_theta": outer, **rope}, ROPE, COPY, where)["rope_theta"])


def _pinpoints(at: str, given: Any, tile: int) -> tuple[tuple[int, int], ...]:
    """Canvases are cut into tiles, so that their sides are multiples of a tile's."""
    pinpoints = tuple((height, width) for height, width in given or PINPOINTS)
    bad = [p for p in pinpoints if any(side % tile or side > TILES * tile for side in p)]
    if bad:
        wanted = f"multiples of the tile's {tile} pixels, {TILES} tiles a side at most"
        raise wrong(at, "image_grid_pinpoints", list(bad[0]), wanted, COPY)
    return pinpoints
