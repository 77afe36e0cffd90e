"""Both encoders against numpy in float64 on tiny folders, what is refused, and the lexical measure."""

import json
import math
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mllm_align.errors import InputError
from mllm_align.generate.similarity import Embedded, Lexical, open_similarity
from mllm_align.models import sentence_encoder
from mllm_align.models.sentence_encoder import open_encoder

PAIRS = Path(__file__).parents[1] / "fixtures" / "similarity_pairs.json"
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


@pytest.fixture(
    scope="module",
    params=[("bert", MEAN), ("bert", CLS), ("mpnet", MEAN)],
    ids=["bert-mean", "bert-cls", "mpnet-mean"],
)
def made(request, tmp_path_factory):
    kind, pooling = request.param
    return kind, pooling, make_folder(tmp_path_factory.mktemp("encoder"), kind, pooling)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "encoder", "mpnet", MEAN)


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


def some_texts() -> list[str]:
    """More than a call of the program takes, from empty to longer than the limit, in no order."""
    rng = np.random.default_rng(3)
    lengths = [5, 0, 1, 30, 31, 200, 62, 63, 3, 148, 149, 100, 8, 2, 17, 40, 12, 9, 70]
    return [" ".join(rng.choice([*WORDS, "zebra"], n)) for n in lengths]


def test_embeddings_are_those_of_the_definition(made, monkeypatch):
    kind, pooling, folder = made
    texts = some_texts()
    encode, shapes = sentence_encoder.encode, set()

    def watched(params, ids, *rest):
        shapes.add(ids.shape)
        return encode(params, ids, *rest)

    monkeypatch.setattr(sentence_encoder, "encode", watched)
    found = open_encoder(folder).embed(texts)
    assert shapes == {(16, 128), (16, LIMIT)}  # 19 texts sorted by length, few programs
    wanted = np.stack([reference(kind, pooling, text) for text in texts])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=0)


def test_pairs(made):
    kind, pooling, folder = made
    similarity = open_similarity(str(folder))
    assert similarity.name == str(folder)
    assert similarity.threshold == 0.97
    first, second = (
        ["the cat sees a dog", "a red dog", "", ""],
        ["the cat sees a b", "a red dog", "", "a"],
    )
    found = similarity(first, second)
    wanted = [
        reference(kind, pooling, a) @ reference(kind, pooling, b)
        for a, b in zip(first, second, strict=True)
    ]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=0)
    np.testing.assert_allclose(found[1:3], 1, atol=1e-6)
    np.testing.assert_array_equal(similarity(second, first), found)
    assert similarity([], []).shape == (0,)


def test_limit_and_case_come_from_the_folder(folder):
    write(folder / "sentence_bert_config.json", {"max_seq_length": 5, "do_lower_case": True})
    similarity = open_similarity(str(folder))
    assert similarity(["the red cat"], ["THE Red cat sees a dog"]) == pytest.approx(1, abs=1e-6)
    (
        folder / "sentence_bert_config.json"
    ).unlink()  # then the tokenizer's own, here the positions there are
    assert open_encoder(folder).max_length == LIMIT


def test_half_precision_weights(folder):
    whole = open_encoder(folder).embed(["the cat sees a dog"])
    save_file({k: v.astype(np.float16) for k, v in tensors("mpnet").items()}, folder / "model.safetensors")
    half = open_encoder(folder).embed(["the cat sees a dog"])
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, whole, atol=5e-3)


def edit(file: Path, **fields) -> None:
    write(file, json.loads(file.read_text()) | fields)


def without(file: Path, name: str) -> None:
    save_file({k: v for k, v in load_file(file).items() if k != name}, file)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "modules.json").unlink(), "modules.json: can't be read"),
        (lambda f: (f / "modules.json").write_text("{"), "modules.json: is not JSON"),
        (lambda f: write(f / "modules.json", [{"type": "a.Transformer", "path": ""}]), "['Transformer']"),
        (lambda f: write(f / "modules.json", {"a": 1}), "where a list belongs"),
        (lambda f: edit(f / "1_Pooling/config.json", pooling_mode_max_tokens=True), "pooling"),
        (lambda f: edit(f / "1_Pooling/config.json", pooling_mode="lasttoken"), "pooling 'lasttoken'"),
        (lambda f: edit(f / "config.json", model_type="roberta"), "model_type is 'roberta'"),
        (lambda f: edit(f / "config.json", hidden_act="relu"), "hidden_act is 'relu'"),
        (lambda f: edit(f / "config.json", vocab_size=7), "embeddings.word_embeddings.weight is [24, 12]"),
        (lambda f: (f / "config.json").write_text("{}"), "model_type"),
        (
            lambda f: write(f / "config_sentence_transformers.json", {"default_prompt_name": "query"}),
            "'query'",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "model.safetensors"),
        (lambda f: without(f / "model.safetensors", "encoder.relative_attention_bias.weight"), "missing"),
    ],
)
def test_refusals(folder, harm, words):
    harm(folder)
    with pytest.raises(InputError) as caught:
        open_similarity(str(folder))
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_side_files_of_other_types_are_refused_in_one_line(folder):
    """Every field of every JSON, with values of other types and numbers out of range."""
    values = (None, True, "x", "", -4, 0, 10**9, 10**400, math.nan, 0.5, [], [[1]], {}, {"a": [None]})
    refused = taken = 0
    for file in sorted(folder.rglob("*.json")):
        before = file.read_text()
        content = json.loads(before)
        for value in values:
            changed = [content | {name: value} for name in content] if isinstance(content, dict) else []
            changed += [[value, *content[1:]], [{**content[0], "path": value}]] if not changed else []
            for new in [*changed, value]:
                write(file, new)
                try:
                    open_encoder(folder).embed(["the cat"])
                    taken += 1
                except InputError as error:
                    refused += 1
                    assert str(error).isprintable() and str(folder) in str(error)
        for text in ("[" * 5000, '{"a": ' * 300 + "1" + "}" * 300):
            file.write_text(text)
            with pytest.raises(InputError, match="nested"):
                open_encoder(folder)
        file.write_text(before)
    assert refused > taken > 0
    assert open_encoder(folder)


@pytest.mark.parametrize("name", ["nobody/has-this", "/no/such/folder", "", "x" * 300])
def test_a_name_that_is_nothing(name):
    with pytest.raises(InputError, match="no such folder") as caught:
        open_similarity(name)
    assert "\n" not in str(caught.value)


def test_hub_folders_bring_only_what_is_read(folder, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = huggingface_hub.utils.filter_repo_objects(
            [
                "1_Pooling/config.json",
                "model.safetensors",
                "vocab.txt",
                "onnx/model.onnx",
                "pytorch_model.bin",
            ],
            allow_patterns=allow_patterns,
        )
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    similarity = open_similarity("someone/encoder")
    assert isinstance(similarity, Embedded)
    assert similarity.name == "someone/encoder"
    assert list(asked["someone/encoder"]) == ["1_Pooling/config.json", "model.safetensors", "vocab.txt"]


# ---- lexical ---------------------------------------------------------------------------------------


def lexical(first: str, second: str) -> float:
    return float(Lexical()([first], [second])[0])


def test_lexical_by_hand():
    # ^a ab bc c$ and ^a ab bd d$ share two of four
    assert lexical("a b c", "a b d") == 0.5
    # ^a ab b$ and ^a ab ba ab b$ share three
    assert lexical("a b", "a b a b") == 0.75
    assert lexical("The cat's hat, is red.", "the CAT'S hat is red") == 1
    assert lexical("A dog", "dog A") == 0
    assert lexical("Yes.", "No.") == 0
    assert lexical("", "...") == 1
    assert lexical("", "a") == 0
    assert Lexical()([], []).shape == (0,)
    assert open_similarity("lexical").name == "lexical"


def test_one_word_makes_a_short_text_different():
    words = [f"w{i}" for i in range(23)]
    changed = ["w0", "other", *words[2:]]
    assert lexical(" ".join(words[:22]), " ".join(changed[:22])) < Lexical.threshold
    assert lexical(" ".join(words), " ".join(changed)) > Lexical.threshold


def test_as_many_pairs_are_different_as_with_the_encoders():
    """Responses changed as BDHS changes them; cosines of the real models stand in the file."""
    kinds = ("yes or no", "one word", "one end", "every end")
    groups = json.loads(PAIRS.read_text())
    rows = [(g["first"], c) for g in groups for c in g["changed"] if c["kind"] in kinds]
    assert len(rows) == 149
    share = np.mean([c["mpnet"] < Embedded.threshold for _, c in rows])
    assert np.mean([c["minilm"] < Embedded.threshold for _, c in rows]) == pytest.approx(share, abs=0.03)
    similarity = Lexical()([first for first, _ in rows], [c["second"] for _, c in rows])
    assert np.mean(similarity < Lexical.threshold) == pytest.approx(share, abs=0.03)
