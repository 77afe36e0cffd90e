"""Tiny sentence-transformers folders with random weights, and what they compute, in numpy and float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [*"abcdefghijklmno", "the", "cat", "dog", "red", "sees"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
HIDDEN, HEADS, MLP, LAYERS, LIMIT = 12, 3, 20, 2, 150


def tensors(kind: str) -> dict[str, np.ndarray]:
    """Random weights under the names of transformers' BertModel and MPNetModel."""
    rng = np.random.default_rng(7)
    found = {}

    def add(name, *shape, mean=0.0):
        found[name] = (mean + 0.3 * rng.standard_normal(shape)).astype(np.float32)

    def linear(name, out, into):
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    def norm(name):
        add(f"{name}.weight", HIDDEN, mean=1.0)
        add(f"{name}.bias", HIDDEN)

    add("embeddings.word_embeddings.weight", len(WORDS) + 4, HIDDEN)
    add("embeddings.position_embeddings.weight", LIMIT + 2, HIDDEN)
    norm("embeddings.LayerNorm")
    if kind == "bert":
        add("embeddings.token_type_embeddings.weight", 2, HIDDEN)
    else:
        add("encoder.relative_attention_bias.weight", 32, HEADS)
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        if kind == "bert":
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{at}.attention.{part}", HIDDEN, HIDDEN)
            norm(f"{at}.attention.output.LayerNorm")
        else:
            for part in "qkvo":
                linear(f"{at}.attention.attn.{part}", HIDDEN, HIDDEN)
            norm(f"{at}.attention.LayerNorm")
        linear(f"{at}.intermediate.dense", MLP, HIDDEN)
        linear(f"{at}.output.dense", HIDDEN, MLP)
        norm(f"{at}.output.LayerNorm")
    return found


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_folder(out: Path, kind: str, pooling: dict) -> Path:
    package = "sentence_transformers.models"
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "path": p, "type": f"{package}.{t}"} for i, (p, t) in enumerate(parts)]
    write(out / "modules.json", modules)
    write(out / "1_Pooling" / "config.json", pooling)
    write(out / "sentence_bert_config.json", {"max_seq_length": LIMIT, "do_lower_case": False})
    config = {
        "model_type": kind,
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": MLP,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": LIMIT + 2,
        "vocab_size": len(WORDS) + 4,
    }
    write(out / "config.json", config | ({"type_vocab_size": 2} if kind == "bert" else {}))
    save_file(tensors(kind), out / "model.safetensors")
    ids = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(out)
    return out


MEAN = {
    "word_embedding_dimension": HIDDEN,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_cls_token": False,
}
CLS = {"embedding_dimension": HIDDEN, "pooling_mode": "cls", "include_prompt": True}


def bucket(distance: int) -> int:
    """The formula of T5 (Raffel et al. 2020) with 32 rows and a reach of 128; distance = key - query."""
    later, n = (16 if distance > 0 else 0), abs(distance)
    if n < 8:
        return later + n
    return later + min(15, 8 + int(math.log(n / 8) / math.log(128 / 8) * 8 + 1e-9))


def reference(kind: str, pooling: dict, text: str) -> np.ndarray:
    """One text at a time, unpadded, head by head, in float64."""
    w = {name: value.astype(np.float64) for name, value in tensors(kind).items()}
    words = [SPECIAL.index("<unk>") if x not in WORDS else 4 + WORDS.index(x) for x in text.split()]
    ids = [0, *words[: LIMIT - 2], 2]
    n, size = len(ids), HIDDEN // HEADS

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return (x - x.mean(axis=-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    first = 0 if kind == "bert" else 2
    x = x + w["embeddings.position_embeddings.weight"][first : first + n]
    bias = np.zeros((n, n, HEADS))
    if kind == "bert":
        x = x + w["embeddings.token_type_embeddings.weight"][0]
    else:
        rows = [[bucket(key - query) for key in range(n)] for query in range(n)]
        bias = w["encoder.relative_attention_bias.weight"][np.array(rows)]
    x = norm("embeddings.LayerNorm", x)
    for i in range(LAYERS):
        at = f"encoder.layer.{i}.attention"
        own = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
        names = own if kind == "bert" else ("attn.q", "attn.k", "attn.v", "attn.o", "LayerNorm")
        q, k, v = (linear(f"{at}.{name}", x) for name in names[:3])
        heads = []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size) + bias[:, :, h])
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
        x = norm(f"{at}.{names[4]}", x + linear(f"{at}.{names[3]}", np.concatenate(heads, axis=1)))
        wide = linear(f"encoder.layer.{i}.intermediate.dense", x)
        wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(f"encoder.layer.{i}.output.LayerNorm", x + linear(f"encoder.layer.{i}.output.dense", wide))
    pooled = x[0] if pooling is CLS else x.mean(axis=0)
    return pooled / np.sqrt((pooled**2).sum())
