"""Sentence embeddings from a sentence-transformers folder: BERT and MPNet encoders in JAX.

The encoder consists of pure functions on a dict of arrays, in float32. Weights are read from safetensors
only, and no code from a folder is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mllm_align.errors import one_line, quoted, refusal
from mllm_align.files import read_json
from mllm_align.models.processor import check_tokenizer, explained
from mllm_align.models.ranges import (
    DEPTH,
    EPS,
    FLAG,
    HEADS,
    WIDTH,
    Maybe,
    Object,
    OneOf,
    Range,
    Text,
    Whole,
    check,
    fields,
    wrong,
)

ROWS = 16  # texts per call of the compiled program
MIN_LENGTH = 32  # tokens; padded lengths double from here, so that few programs are compiled
COPY = "copy the folder again from where the model came from"
OTHERS = "take a BERT or MPNet model with mean or cls pooling, such as all-mpnet-base-v2"

_FEED_FORWARD = {"up": "intermediate.dense", "down": "output.dense", "mlp_norm": "output.LayerNorm"}
# our name -> name in a checkpoint, within encoder.layer.N
_NAMES = {
    "bert": {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        **_FEED_FORWARD,
    },
    "mpnet": {
        "q": "attention.attn.q",
        "k": "attention.attn.k",
        "v": "attention.attn.v",
        "o": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
        **_FEED_FORWARD,
    },
}
FOLDER = "give a sentence-transformers folder, with modules.json and the folders that it names"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Fields read from each file: name -> (value of an absent field, range).
MODULE = {"type": (None, Text()), "path": (None, Text())}
CONFIG = {
    "model_type": (None, OneOf(tuple(_NAMES))),
    "hidden_act": (None, OneOf(("gelu",))),
    "position_embedding_type": ("absolute", OneOf(("absolute",))),
    "relative_attention_num_buckets": (32, OneOf((32,))),
    "hidden_size": (None, WIDTH),
    "intermediate_size": (None, WIDTH),
    "num_hidden_layers": (None, DEPTH),
    "num_attention_heads": (None, HEADS),
    "max_position_embeddings": (None, Whole(5, 1 << 24)),
    "vocab_size": (None, WIDTH),
    "type_vocab_size": (2, WIDTH),
    "layer_norm_eps": (None, EPS),
}
SETTINGS = {"max_seq_length": (None, Maybe(Whole(3, 1 << 31))), "do_lower_case": (False, Maybe(FLAG))}
PROMPTS = {"default_prompt_name": (None, OneOf((None,)))}

_FIRST_POSITION = {"bert": 0, "mpnet": 2}  # MPNet's positions start after the id of its padding token

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class SentenceEncoder:
    """A loaded folder. max_length: tokens, special ones included, to which a text is truncated."""

    tokenizer: Any
    params: dict[str, Any]
    heads: int
    eps: float
    pooling: str
    max_length: int
    lower: bool

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [n, D] of n texts, float32, of unit norm. An empty text has an embedding too."""
        vectors = np.zeros((len(texts), self.params["word"].shape[1]), np.float32)
        ids = [self._tokens(text) for text in texts]
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        parts = [by_length[i : i + ROWS] for i in range(0, len(ids), ROWS)]
        for part, computed in [(part, self._program([ids[i] for i in part])) for part in parts]:
            vectors[part] = np.asarray(computed)[: len(part)]
        return vectors

    def _tokens(self, text: str) -> list[int]:
        text = text.lower() if self.lower else text
        return self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]

    def _program(self, ids: list[list[int]]) -> jax.Array:
        longest = max(MIN_LENGTH, *map(len, ids))
        padded = np.zeros((ROWS, min(1 << (longest - 1).bit_length(), self.max_length)), np.int32)
        lengths = np.zeros(ROWS, np.int32)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return encode(self.params, padded, lengths, self.heads, self.eps, self.pooling)


@partial(jax.jit, static_argnames=("heads", "eps", "pooling"))
def encode(
    params: dict[str, Any],
    ids: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    heads: int,
    eps: float,
    pooling: str,
) -> Float[Array, "B D"]:
    """Unit-norm embeddings, from token ids padded on the right to S."""
    length = ids.shape[1]
    seen = jnp.arange(length)[None] < lengths[:, None]
    bias = jnp.where(seen, 0.0, -1e30)[:, None, None, :]
    if "relative" in params:
        bias = bias + params["relative"][_relative_buckets(length)].transpose(2, 0, 1)[None]
    x = params["word"][ids] + params["position"][None, :length]
    x = _norm(params["norm"], x, eps)

    def layer(x, weights):
        def linear(name, x):
            return _einsum("bsi,io->bso", x, weights[name]["weight"]) + weights[name]["bias"][None, None]

        q, k, v = (linear(name, x).reshape(*x.shape[:2], heads, -1) for name in "qkv")
        scores = _einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5 + bias
        mixed = _einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores), v).reshape(x.shape)
        x = _norm(weights["attention_norm"], x + linear("o", mixed), eps)
        wide = jax.nn.gelu(linear("up", x), approximate=False)
        return _norm(weights["mlp_norm"], x + linear("down", wide), eps), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    # the mean is not divided by the number of tokens, because the result is normalized
    pooled = x[:, 0] if pooling == "cls" else jnp.where(seen[:, :, None], x, 0.0).sum(1)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def _norm(weights: dict[str, Any], x: Float[Array, "B S D"], eps: float) -> Float[Array, "B S D"]:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
    return x * weights["weight"][None, None] + weights["bias"][None, None]


def _relative_buckets(length: int) -> np.ndarray:
    """Row of MPNet's relative bias table for each (query, key): [length, length].

    Rows 0 to 15 are for keys at or before the query, 16 to 31 for later ones. In each half, distances 0
    to 7 have one row each, then each half octave has one; the last row is for distances of 91 and more.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    far = np.maximum(np.abs(distance), 8)
    coarse = np.minimum(8 + np.floor(2 * np.log2(far / 8)).astype(int), 15)
    return np.where(np.abs(distance) < 8, np.abs(distance), coarse) + 16 * (distance > 0)


# ---- folders ---------------------------------------------------------------------------------------


def open_encoder(path: str | Path) -> SentenceEncoder:
    """Load a sentence-transformers folder onto this process's first device.

    Raises InputError for a folder that is missing, incomplete or of an unsupported model.
    """
    path = Path(path)
    modules = read_json(path / "modules.json", FOLDER, list)
    for number, module in enumerate(modules):
        check(str(path / "modules.json"), f"module {number}", module, Object(), COPY)
        fields(str(path / "modules.json"), module, MODULE, COPY, f"module {number}: ")
    kinds = [module["type"].split(".")[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise refusal(str(path / "modules.json"), f"modules {kinds} are not supported", OTHERS)
    folder, pooling = (_inside(path, module["path"]) for module in modules[:2])
    config = fields(f"{folder}/config.json", read_json(folder / "config.json", COPY), CONFIG, OTHERS)
    mode = _pooling(pooling / "config.json")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        wanted = f"a divisor of the width {hidden}"
        raise wrong(f"{folder}/config.json", "num_attention_heads", heads, wanted, COPY)
    settings = _optional(folder / "sentence_bert_config.json", SETTINGS)
    _optional(path / "config_sentence_transformers.json", PROMPTS)
    params = _params(folder / "model.safetensors", config)
    tokenizer = _tokenizer(folder, config["vocab_size"])
    max_length = settings["max_seq_length"] or tokenizer.model_max_length
    return SentenceEncoder(
        tokenizer=tokenizer,
        params=jax.device_put(params, jax.local_devices()[0]),
        heads=heads,
        eps=float(config["layer_norm_eps"]),
        pooling=mode,
        max_length=min(max_length, len(params["position"])),
        lower=bool(settings["do_lower_case"]),
    )


def _inside(path: Path, name: str) -> Path:
    """A module's folder, which must be in the folder of its model."""
    if name not in ("", Path(name).name) or name == ".." or "\0" in name:
        raise wrong(str(path / "modules.json"), "path", name, "a folder beside modules.json", COPY)
    return path / name


def _optional(file: Path, table: Mapping[str, tuple[Any, Range]]) -> dict[str, Any]:
    return fields(str(file), read_json(file, COPY) if file.exists() else {}, table, OTHERS)


def _pooling(file: Path) -> str:
    """The pooling mode, mean or cls: one field, or in older versions a flag per mode."""
    config = read_json(file, COPY)
    flags = {"mean_tokens": "mean", "cls_token": "cls"}
    flagged = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    modes = [flags.get(name.removeprefix("pooling_mode_"), name) for name in flagged]
    mode = config.get("pooling_mode") or (modes[0] if len(modes) == 1 else modes)
    if mode not in ("mean", "cls"):
        raise refusal(str(file), f"pooling {quoted(mode)} is not supported", OTHERS)
    return mode


def _tokenizer(folder: Path, vocab: int) -> Any:
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            read_json(folder / name, COPY)
    with explained(f"{folder}: the tokenizer can't be read", COPY):
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    check_tokenizer(folder, tokenizer, vocab)
    # transformers writes 10**30 for no limit
    check(str(folder), "model_max_length", tokenizer.model_max_length, Whole(3, 10**31), COPY)
    return tokenizer


def _params(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        remedy = "save the model as model.safetensors, or copy the folder again"
        raise refusal(str(file), f"can't be read ({one_line(error, 160)})", remedy) from error
    architecture, hidden, mlp = config["model_type"], config["hidden_size"], config["intermediate_size"]

    def tensor(name: str, *shape: int) -> np.ndarray:
        if name not in stored or stored[name].shape != shape:
            found = list(stored[name].shape) if name in stored else "missing"
            raise refusal(str(file), f"tensor {name} is {found}, config.json requires {list(shape)}", COPY)
        return stored[name].astype(np.float32)

    def pair(name: str, *shape: int) -> dict[str, np.ndarray]:
        return {"weight": tensor(f"{name}.weight", *shape).T, "bias": tensor(f"{name}.bias", shape[0])}

    shapes = {
        "up": (mlp, hidden),
        "down": (hidden, mlp),
        "attention_norm": (hidden,),
        "mlp_norm": (hidden,),
    }
    layers = [
        {
            ours: pair(f"encoder.layer.{i}.{theirs}", *shapes.get(ours, (hidden, hidden)))
            for ours, theirs in _NAMES[architecture].items()
        }
        for i in range(config["num_hidden_layers"])
    ]
    position = tensor("embeddings.position_embeddings.weight", config["max_position_embeddings"], hidden)
    position = position[_FIRST_POSITION[architecture] :]
    params = {
        "word": tensor("embeddings.word_embeddings.weight", config["vocab_size"], hidden),
        "norm": pair("embeddings.LayerNorm", hidden),
        "layers": jax.tree.map(lambda *each: np.stack(each), *layers),
    }
    if architecture == "bert":  # all tokens of a single text have type 0: add its embedding here
        types = tensor("embeddings.token_type_embeddings.weight", config["type_vocab_size"], hidden)
        position = position + types[:1]
    else:
        params["relative"] = tensor(
            "encoder.relative_attention_bias.weight", 32, config["num_attention_heads"]
        )
    return {**params, "position": position}
