"""How alike responses are: cosines of the encoders against float64, the lexical measure by hand."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from encoder_folders import CLS, MEAN, make_folder, reference

from mllm_align.errors import InputError
from mllm_align.generation.similarity import Embedded, Lexical, open_similarity

PAIRS = Path(__file__).parents[1] / "fixtures" / "similarity_pairs.json"


@pytest.fixture(params=[("bert", CLS), ("mpnet", MEAN)], ids=["bert-cls", "mpnet-mean"])
def made(request, tmp_path):
    """(kind, pooling, folder) of an encoder."""
    kind, pooling = request.param
    return kind, pooling, make_folder(tmp_path / "encoder", kind, pooling)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "encoder", "mpnet", MEAN)


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


def test_what_is_no_encoder_is_refused(folder):
    (folder / "modules.json").unlink()
    with pytest.raises(InputError, match=r"modules\.json: can't be read"):
        open_similarity(str(folder))


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
