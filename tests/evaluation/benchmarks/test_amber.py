"""AMBER against counts by hand: nouns of descriptions, yes-or-no questions; what its libraries need."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from bench_folders import lines, value
from refusals import refusal

from mllm_align import DataConfig
from mllm_align.evaluation.answers import score_answers
from mllm_align.evaluation.benchmarks import amber
from mllm_align.evaluation.benchmarks.amber import Amber, Toolkit, Words, nltk_nouns, spacy_vectors

KINDS = [
    ("generative", ["tree", "bush", "dog", "dog"]),
    ("discriminative-hallucination", "no"),
    ("discriminative-hallucination", "no"),
    ("discriminative-attribute-state", "yes"),
    ("discriminative-attribute-number", "no"),
    ("discriminative-relation", "yes"),
    ("relation", "no"),
    ("generative", ["lake"]),
]
RELATED = {"tree": ["bush"], "bush": [], "dog": ["puppy"], "lake": ["water"], "sun": [], "lamp": ["light"]}
ALIKE = {("puppy", "lake"): 0.81, ("sun", "lake"): 0.9, ("sun", "dog"): 0.95, ("lamp", "tree"): 0.8}
QUESTIONS = Amber(part="discriminative")


def similarity(one, other):
    return 1.0 if one == other else ALIKE.get((one, other), 0.0)


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    """Every word is a noun."""
    made = Toolkit(str.split, similarity, {"vectors": "made up"})
    monkeypatch.setattr(amber, "toolkit", lambda vectors: made)


@pytest.fixture
def folder(tmp_path):
    labels = [
        {"id": i, "type": kind, "truth": truth}
        | ({"hallu": ["sun", "lake"]} if kind == "generative" else {})
        for i, (kind, truth) in enumerate(KINDS, 1)
    ]
    asked = [{"id": i, "image": f"AMBER_{i}.jpg", "query": f"Is it {i}?"} for i in range(1, 9)]
    value(tmp_path / "amber/annotations.json", labels)
    value(tmp_path / "amber/query_all.json", asked[::-1])
    value(tmp_path / "amber/relation.json", RELATED)
    (tmp_path / "amber/safe_words.txt").write_text("light\n")
    return tmp_path / "amber"


@pytest.mark.parametrize(
    "text, named, hallucinated, covered, imagined",
    [
        ("a tree", "tree", "", {0}, set()),
        ("bush", "bush", "", {0}, set()),  # a word of the tree before it is an object of its own
        ("dog puppy", "dog puppy", "", {2}, set()),  # a second dog is never named
        ("light Dog cat", "light", "", set(), set()),  # safe; not in the list as it is written
        ("water", "water", "water", set(), {1}),
        ("lake lake", "lake lake", "lake lake", set(), {1}),
        ("sun", "sun", "", {2}, {0}),  # like the dog, and expected all the same
        ("lamp", "lamp", "lamp", set(), set()),  # 0.8 is not above 0.8
        ("", "", "", set(), set()),
    ],
)
def test_how_a_description_is_read(text, named, hallucinated, covered, imagined):
    words = Words(RELATED, frozenset(("light",)), "")
    found = words.read(text.split(), KINDS[0][1], ["sun", "lake"], similarity)
    assert (found.named, found.hallucinated) == (named.split(), hallucinated.split())
    assert (found.covered, found.imagined) == (covered, imagined)


def test_an_expected_object_by_name_and_another_by_likeness():
    words = Words(RELATED, frozenset(), "")
    # the sun is expected, and the first expected thing like the sun is the lake
    assert words.read(["sun"], ["bush"], ["lake", "sun"], similarity).imagined == {0, 1}


SAID = {2: "No", 3: "no", 4: "Yes", 5: "No", 6: "No", 7: "Yes."}
DESCRIBED = {1: "tree dog lamp water", 8: "water lake light"}


def answers(tmp_path, said):
    return lines(tmp_path / "a.jsonl", [{"id": i, "response": text} for i, text in said.items()])


def test_descriptions_of_a_hand_count(folder, tmp_path):
    found = score_answers(answers(tmp_path, DESCRIBED), folder, Amber(part="generative"))
    assert found.results["scores"] == {
        "generative": {
            "chair": pytest.approx(200 / 7),  # lamp and water of 1, of seven nouns
            "cover": pytest.approx(300 / 5),
            "hal": 50,
            "cog": 25,  # the lake of 1; what is there is not looked up among the expected
        }
    }
    assert found.results["versions"]["vectors"] == "made up" and found.results["n"] == 2
    assert found.lines[1]["hallucinated"] == ["lamp", "water"] and found.lines[1]["covered"] == [
        "tree",
        "dog",
    ]


def test_the_amber_score_is_of_rounded_figures(folder, tmp_path):
    scores = score_answers(answers(tmp_path, SAID | DESCRIBED), folder, "amber").results["scores"]
    assert scores["f1"] == pytest.approx(100 * 2 * 0.667 * 0.5 / (0.667 + 0.5 + 0.0001))  # 57.1502
    assert scores["amber_score"] == pytest.approx((100 - 28.6 + 57.2) / 2)
    assert scores["accuracy"] == 50 and scores["generative"]["cog"] == 25


def test_the_figures_of_a_hand_count(folder, tmp_path):
    found = score_answers(answers(tmp_path, SAID), folder, QUESTIONS).results
    scores = found["scores"]
    assert "vectors" not in found["versions"] and "amber_score" not in scores
    # right: 2, 4, 5; of three answers of No two are right; four labels are no
    assert scores["accuracy"] == 50 and scores["recall"] == pytest.approx(50)
    assert scores["precision"] == pytest.approx(200 / 3)
    assert scores["f1"] == pytest.approx(100 * 2 * 0.667 * 0.5 / (0.667 + 0.5 + 0.0001))
    assert scores["existence"] == {
        "accuracy": 50,
        "precision": 100,
        "recall": pytest.approx(50),
        "f1": pytest.approx(100 / (1.5 + 0.001)),
    }
    assert scores["attribute"]["f1"] == pytest.approx(200 / 2.0001)
    assert scores["relation"] == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}


def test_questions_and_rows(folder):
    items = QUESTIONS.items(folder, DataConfig())
    assert [item.record.id for item in items] == ["7", "6", "5", "4", "3", "2"]
    assert items[0].record.images[0].path == folder / "image/AMBER_7.jpg"
    assert items[0].record.messages[-1].text.startswith("Is it 7?\nAnswer the question using")
    assert QUESTIONS.row(items[0], "No") == {"id": 7, "response": "No"}
    every = Amber().items(folder, DataConfig())
    assert [item.record.id for item in every] == list("87654321")
    assert every[0].record.messages[-1].text == "Is it 8?"  # a description is asked for in its words alone


def test_what_does_not_join(folder):
    read = QUESTIONS.items
    asked = [{"id": i, "image": "a.jpg", "query": "?"} for i in (1, 2, 3, 4, 5, 9)]
    value(folder / "query_all.json", asked)
    assert "annotations.json: 1 questions have no label: 9" in refusal(read, folder, DataConfig())
    value(folder / "query_all.json", asked[:5])
    assert "annotations.json: 2 labels are of no question: 6, 7" in refusal(read, folder, DataConfig())
    value(folder / "query_all.json", [*asked, asked[0]])
    assert "query_all.json: 1 ids come several times: 1" in refusal(read, folder, DataConfig())
    value(folder / "annotations.json", [{"id": 2, "type": "number", "truth": "yes"}])
    value(folder / "query_all.json", asked[1:2])
    assert "label 2: is of type 'number'" in refusal(read, folder, DataConfig())
    value(folder / "annotations.json", [{"id": 2, "type": "relation", "truth": "maybe"}])
    assert "label 2, truth: is 'maybe'; it must be yes or no" in refusal(read, folder, DataConfig())


def test_objects_without_a_line_of_words(folder):
    rows = [{"id": 1, "type": "generative", "truth": ["tree", "moon", 3], "hallu": []}]
    value(folder / "annotations.json", rows)
    value(folder / "query_all.json", [{"id": 1, "image": "a.jpg", "query": "?"}])
    said = refusal(Amber().items, folder, DataConfig())
    assert "label 1, truth: 2 objects are not in relation.json: moon, 3; get both files again" in said
    value(folder / "relation.json", {"tree": "bush"})
    amber.words_of.cache_clear()
    assert "relation.json, tree: is no list of words" in refusal(Amber().items, folder, DataConfig())


# ---- libraries ---------------------------------------------------------------------------------------


def test_nouns_are_what_is_tagged_so():
    tags = {"Two": "CD", "dogs": "NNS", "swim": "VBP", "London": "NNP", "lakes": "NNS"}
    stub = SimpleNamespace(
        word_tokenize=str.split,
        pos_tag=lambda words: [(word, tags[word]) for word in words],
        stem=SimpleNamespace(
            WordNetLemmatizer=lambda: SimpleNamespace(lemmatize=lambda word: word.rstrip("s"))
        ),
    )
    assert nltk_nouns(stub)("Two dogs swim London lakes") == ["dog", "London", "lake"]


OTHER = "or ask the yes-or-no questions alone: --evaluator.part discriminative"


def test_what_is_missing_is_named_with_the_command_that_gets_it(monkeypatch, tmp_path):
    nltk = importlib.import_module("nltk")

    def find(name):
        if name == "spacy":
            raise ImportError("none", name="spacy")
        return nltk

    monkeypatch.setattr(amber, "importlib", SimpleNamespace(import_module=find))
    wanted = f"amber's descriptions need spacy; pip install 'mllm-align[amber]', {OTHER}"
    assert refusal(REAL, "none") == wanted
    monkeypatch.setattr(amber, "importlib", SimpleNamespace(import_module=lambda name: nltk))
    (tmp_path / "corpora/wordnet").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    names = ("punkt_tab", "averaged_perceptron_tagger_eng")
    wanted = f"need nltk's {', '.join(names)}; python -m nltk.downloader {' '.join(names)}, {OTHER}"
    assert wanted in refusal(REAL, "none")


REAL = amber.toolkit


@pytest.mark.slow
def test_vectors_of_a_spacy_folder(tmp_path):
    spacy = importlib.import_module("spacy")
    made = spacy.blank("en")
    vectors = {"dog": [3, 4], "puppy": [4, 3], "sun": [-4, 3], "station": [1, 1]}
    for word, vector in vectors.items():
        made.vocab.set_vector(word, np.array(vector, np.float32))
    made.to_disk(tmp_path / "own")
    alike, version = spacy_vectors(str(tmp_path / "own"))
    assert alike("dog", "puppy") == pytest.approx(24 / 25) and alike("dog", "sun") == pytest.approx(0)
    assert alike("dog", "moon") == 0 and alike("moon", "moon") == 1
    assert alike("dog station", "dog") == pytest.approx(np.dot([2, 2.5], [3, 4]) / 5 / np.hypot(2, 2.5))
    assert version == "en_pipeline 0.0.0"
    spacy.blank("en").to_disk(tmp_path / "bare")
    assert "bare: has no word vectors" in refusal(spacy_vectors, str(tmp_path / "bare"))
    (tmp_path / "empty").mkdir()
    assert "empty: can't be read" in refusal(spacy_vectors, str(tmp_path / "empty"))
    said = refusal(spacy_vectors, "en_core_web_none")
    assert "need the word vectors en_core_web_none; python -m spacy download en_core_web_none" in said
