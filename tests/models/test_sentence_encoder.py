"""Sentence encoders against numpy in float64 on tiny folders, and the folders that are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from encoder_folders import CLS, HIDDEN, LIMIT, MEAN, WORDS, bucket, make_folder, reference, tensors, write
from safetensors.numpy import load_file, save_file

from mllm_align.errors import InputError
from mllm_align.models import sentence_encoder
from mllm_align.models.sentence_encoder import encode, open_encoder


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


def some_texts() -> list[str]:
    """More than a call of the program takes, from empty to longer than the limit, in no order."""
    rng = np.random.default_rng(3)
    lengths = [5, 0, 1, 30, 31, 200, 62, 63, 3, 148, 149, 100, 8, 2, 17, 40, 12, 9, 70]
    return [" ".join(rng.choice([*WORDS, "zebra"], n)) for n in lengths]


def test_embeddings_are_those_of_the_definition(made, monkeypatch):
    kind, pooling, folder = made
    texts = some_texts()
    shapes = set()

    def watched(params, ids, *rest):
        shapes.add(ids.shape)
        return encode(params, ids, *rest)

    monkeypatch.setattr(sentence_encoder, "encode", watched)
    found = open_encoder(folder).embed(texts)
    assert shapes == {(16, 128), (16, LIMIT)}  # 19 texts sorted by length, few programs
    wanted = np.stack([reference(kind, pooling, text) for text in texts])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=0)


def test_distances_of_mpnet_are_those_of_t5():
    found = sentence_encoder._relative_buckets(300)
    wanted = [[bucket(key - query) for key in range(300)] for query in range(300)]
    assert (found == np.array(wanted)).all()
    assert set(found.flat) == set(range(32)) - {16}  # a key at distance 0 is not a later one


def test_the_length_that_a_text_is_padded_to_does_not_matter(made):
    _kind, pooling, folder = made
    encoder = open_encoder(folder)
    ids = np.array([[0, 5, 9, 7, 2] + [3] * 27, [0, 6, 2] + [3] * 29], np.int32)
    mode = "cls" if pooling is CLS else "mean"
    found = [
        encode(encoder.params, ids[:, :length], np.array([5, 3]), encoder.heads, encoder.eps, mode)
        for length in (5, 32)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-6)


def test_limit_and_case_come_from_the_folder(folder):
    write(folder / "sentence_bert_config.json", {"max_seq_length": 5, "do_lower_case": True})
    encoder = open_encoder(folder)
    assert (encoder.max_length, encoder.lower) == (5, True)
    short, long = encoder.embed(["the red cat", "THE Red cat sees a dog"])
    np.testing.assert_allclose(short, long, atol=1e-6)  # three words, and the special tokens
    (folder / "sentence_bert_config.json").unlink()
    assert open_encoder(folder).max_length == LIMIT  # the tokenizer's own is larger than the table


def test_a_folder_without_normalize_is_normalized_all_the_same(folder):
    whole = open_encoder(folder).embed(["the cat"])
    write(folder / "modules.json", json.loads((folder / "modules.json").read_text())[:2])
    np.testing.assert_array_equal(open_encoder(folder).embed(["the cat"]), whole)


def test_no_texts_have_no_embeddings(folder):
    assert open_encoder(folder).embed([]).shape == (0, HIDDEN)


def test_half_precision_weights(folder):
    whole = open_encoder(folder).embed(["the cat sees a dog"])
    save_file({k: v.astype(np.float16) for k, v in tensors("mpnet").items()}, folder / "model.safetensors")
    half = open_encoder(folder).embed(["the cat sees a dog"])
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, whole, atol=5e-3)


def edit(file: Path, **fields) -> None:
    write(file, json.loads(file.read_text()) | fields)


def edit_module(folder: Path, number: int, **fields) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[number] |= fields
    write(folder / "modules.json", modules)


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
        (lambda f: edit(f / "config.json", num_attention_heads=5), "a divisor of the width 12"),
        (lambda f: edit_module(f, 1, path="../elsewhere"), "a folder beside modules.json"),
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
        open_encoder(folder)
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
