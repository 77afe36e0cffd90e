"""AMBER: descriptions that may name what is not there, and yes-or-no questions, on the same pictures."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.errors import InputError, first_few, one_line, refusal
from mllm_align.evaluation.base import EVALUATORS, Item, Scored, Statistic
from mllm_align.evaluation.folders import (
    Prompted,
    ask,
    field,
    find,
    folder_of,
    pictures,
    read_value,
    unique,
)

RELATION, SAFE = "relation.json", "safe_words.txt"
GENERATIVE = "generative"
KINDS = {
    GENERATIVE: GENERATIVE,
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}
ALIKE = 0.8
"""Words whose vectors' cosine is above this are of one thing."""


def _f1(group: str, small: float) -> Statistic:
    def value(figures: Any) -> np.ndarray:
        precision, recall = (
            np.round(figures[f"{group}{name}"], 1) / 100 for name in ("precision", "recall")
        )
        return 100 * 2 * precision * recall / (precision + recall + small)

    return value


def _score(figures: Any) -> np.ndarray:
    chair, f1 = figures[f"{GENERATIVE}/chair"], _f1("", 1e-4)(figures)
    return (100 - np.round(chair, 1) + np.round(f1, 1)) / 2


@EVALUATORS.register("amber")
@dataclass(frozen=True)
class Amber(Prompted):
    """AMBER (Wang et al. 2023, https://arxiv.org/abs/2311.07397), scored as its inference.py does, in %.

    Descriptions (`Words.read` tells which nouns count): chair, hallucinated nouns of all that count;
    cover, objects named of all that are there; hal, descriptions that hallucinate; cog, named objects of
    those that people would expect and that are not there.

    Yes-or-no questions, over all and by existence, attribute and relation: accuracy; precision and recall
    of the answer no; F1 of these as rounded to a digit, with 0.0001 in the denominator (0.001 for
    existence). Only answers that are exactly Yes or No count as such: any other is wrong, and no answer of
    no.

    amber_score: the mean of 100 - chair and F1, both rounded to a digit. AMBER adds 0.001 to every
    denominator, so that none is 0; here a figure of nothing is 0. It has no prompt for short answers: that
    is LLaVA's. The bootstrap draws questions.
    """

    derived = {
        "f1": _f1("", 1e-4),
        "existence/f1": _f1("existence/", 1e-3),
        "attribute/f1": _f1("attribute/", 1e-4),
        "relation/f1": _f1("relation/", 1e-4),
        "amber_score": _score,
    }
    ways = {"chair": -1, "hal": -1, "cog": -1}
    part: Literal["all", "generative", "discriminative"] = "all"
    """Descriptions (generative), yes-or-no questions (discriminative), or both."""
    vectors: str = "en_core_web_lg"
    """Word vectors: a spaCy pipeline that is installed, or its folder. Published figures are with the
    default."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=512)

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        place = pictures(folder, config, "image", "images")
        asked = find(folder, "query_all.json", "query/query_all.json")
        labelled = find(folder, "annotations.json", "data/annotations.json")
        labels, questions = _by_id(labelled), _by_id(asked)
        bare = [id for id in questions if id not in labels]
        if bare:
            problem = f"{len(bare)} questions have no label: {first_few(bare)}"
            raise refusal(str(labelled), problem, "get both files again")
        wanted = {id: row for id, row in labels.items() if self._wants(row.get("type") == GENERATIVE)}
        left = [id for id in wanted if id not in questions]
        if left:
            problem = f"{len(left)} labels are of no question: {first_few(left)}"
            raise refusal(str(labelled), problem, "get both files again")
        shared: dict[str, Any] = {}
        if self._wants(True):
            toolkit(self.vectors)  # what is missing shall show before the model is asked
            shared = {"words": str(folder), "digest": words_of(folder).digest}
        items = []
        for id, row in questions.items():
            if id not in wanted:
                continue
            where, at = f"{asked} question {id}", f"{labelled} label {id}"
            image, question = (field(row, name, str, where) for name in ("image", "query"))
            group = _group(wanted[id], at)
            if group == GENERATIVE:
                prompt, label = "{question}", shared | _objects(wanted[id], words_of(folder), at)
            else:
                prompt, label = self.prompt, {"label": _truth(wanted[id], at)}
            items.append(ask(id, place(image), prompt, question, where, group=group, **label))
        return items

    def _wants(self, generative: bool) -> bool:
        return self.part in ("all", "generative" if generative else "discriminative")

    def versions(self) -> dict[str, str]:
        return dict(toolkit(self.vectors).versions) if self._wants(True) else {}

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        return {"id": int(item.record.id), "response": answer}

    def score(self, item: Item, answer: str) -> Scored:
        return self._described(item, answer) if "words" in item.labels else _answered(item, answer)

    def _described(self, item: Item, answer: str) -> Scored:
        tools, words = toolkit(self.vectors), words_of(Path(item.labels["words"]))
        there, expected = item.labels["truth"], item.labels["hallu"]
        found = words.read(tools.nouns(answer), there, expected, tools.similarity)
        figures = {
            "chair": (100 * len(found.hallucinated), len(found.named)),
            "cover": (100 * len(found.covered), len(there)),
            "hal": 100.0 * bool(found.hallucinated),
            "cog": (100 * len(found.imagined), len(expected)),
        }
        details = {
            "group": GENERATIVE,
            "named": found.named,
            "hallucinated": found.hallucinated,
            "covered": [there[place] for place in sorted(found.covered)],
            "imagined": [expected[place] for place in sorted(found.imagined)],
        }
        return Scored({f"{GENERATIVE}/{name}": each for name, each in figures.items()}, details)


def _answered(item: Item, answer: str) -> Scored:
    true, group = item.labels["label"], item.labels["group"]
    said_no, no = answer == "No", true == "no"
    right = answer == ("No" if no else "Yes")
    figures = {
        "accuracy": 100.0 * right,
        "precision": (100 * (said_no and no), said_no),
        "recall": (100 * (said_no and no), no),
    }
    both = figures | {f"{group}/{name}": each for name, each in figures.items()}
    return Scored(both, {"group": group, "label": true, "right": right})


# ---- labels ------------------------------------------------------------------------------------------


def _by_id(file: Path) -> dict[str, dict[str, Any]]:
    rows = read_value(file, list)
    ids = [str(field(row, "id", int, f"{file} row {n}")) for n, row in enumerate(rows, 1)]
    unique(ids, file)
    return dict(zip(ids, rows, strict=True))


def _group(row: dict[str, Any], where: str) -> str:
    kind = field(row, "type", str, where)
    if kind not in KINDS:
        raise refusal(where, f"is of type {kind!r}", "get the file again")
    return KINDS[kind]


def _truth(row: dict[str, Any], where: str) -> str:
    true = field(row, "truth", str, where)
    if true not in ("yes", "no"):
        raise refusal(f"{where}, truth", f"is {true!r}", "it must be yes or no")
    return true


def _objects(row: dict[str, Any], words: Words, where: str) -> dict[str, list[str]]:
    """truth: the objects in the picture. hallu: those that people would expect and that are not there."""
    found = {name: field(row, name, list, where) for name in ("truth", "hallu")}
    for name, objects in found.items():
        strange = [str(each) for each in objects if not isinstance(each, str) or each not in words.related]
        if strange:
            problem = f"{len(strange)} objects are not in {RELATION}: {first_few(strange)}"
            raise refusal(f"{where}, {name}", problem, "get both files again")
    return found


# ---- the words of a description ----------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """named: the nouns that count, in order. hallucinated: those of them that are of nothing there.
    covered, imagined: which objects of the picture, and which of the expected ones, are named."""

    named: list[str]
    hallucinated: list[str]
    covered: set[int]
    imagined: set[int]


@dataclass(frozen=True)
class Words:
    """related: object -> words that stand for it, too. safe: words that are never hallucinated."""

    related: Mapping[str, Sequence[str]]
    safe: frozenset[str]
    digest: str

    def read(
        self,
        nouns: Sequence[str],
        there: Sequence[str],
        expected: Sequence[str],
        similarity: Callable[[str, str], float],
    ) -> Reading:
        """How AMBER's inference.py reads a description.

        A noun counts if `related` has it, as object or as word; a safe one counts, and that is all. A noun
        that stands for an object in the picture covers that object. Any other is looked up among the words
        of the expected objects, by name and by likeness, and covers the first object alike in the picture;
        if there is none it is hallucinated.
        """
        known = {*self.related, *(word for words in self.related.values() for word in words)}
        real, unreal = self._stand_for(there), self._stand_for(expected)
        found = Reading([noun for noun in nouns if noun in known], [], set(), set())
        for noun in found.named:
            if noun in self.safe:
                continue
            if noun in real:
                found.covered.add(real[noun])
                continue
            alike, imagined = (
                next(({at} for word, at in of.items() if similarity(noun, word) > ALIKE), set())
                for of in (real, unreal)
            )
            found.covered.update(alike)
            found.imagined.update(imagined, {unreal[noun]} if noun in unreal else ())
            if not alike:
                found.hallucinated.append(noun)
        return found

    def _stand_for(self, objects: Sequence[str]) -> dict[str, int]:
        """Word -> the place of the object that it stands for. Words related to an object come before the
        objects' own names, so that a noun that is both stands for the object that it is related to."""
        found: dict[str, int] = {}
        for place, each in enumerate(objects):
            for word in self.related[each]:
                found.setdefault(word, place)
        for place, each in enumerate(objects):
            found.setdefault(each, place)
        return found


@cache
def words_of(folder: Path) -> Words:
    """The words of a folder's relation.json and safe_words.txt."""
    file, safe = find(folder, RELATION, f"data/{RELATION}"), find(folder, SAFE, f"data/{SAFE}")
    related = read_value(file, dict)
    for name, words in related.items():
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise refusal(f"{file}, {name}", "is no list of words", "get the file again")
    text = safe.read_text(encoding="utf-8")
    digest = sha256(file.read_bytes() + text.encode()).hexdigest()[:16]
    return Words(related, frozenset(text.splitlines()), digest)


# ---- libraries ---------------------------------------------------------------------------------------

DATA = {
    "punkt_tab": "tokenizers/punkt_tab/english/",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng/",
    "wordnet": "corpora/wordnet/",
}
"""What nltk needs: name -> place."""


@dataclass(frozen=True)
class Toolkit:
    """nouns: those of a text, each as WordNet has it (the singular). similarity: cosine of the vectors of
    two words, 0 where one has none. versions: name -> version."""

    nouns: Callable[[str], list[str]]
    similarity: Callable[[str, str], float]
    versions: Mapping[str, str]


@cache
def toolkit(vectors: str) -> Toolkit:
    """nltk's words and spaCy's vectors. Raises InputError, which says what is missing and how it is had:
    nothing is downloaded."""
    try:
        nltk: Any = importlib.import_module("nltk")
        importlib.import_module("spacy")
    except ImportError as error:
        raise _missing(error.name or "a package", "pip install 'mllm-align[amber]'") from error
    missing = [name for name, place in DATA.items() if not _has(nltk, place)]
    if missing:
        names = " ".join(missing)
        raise _missing(f"nltk's {', '.join(missing)}", f"python -m nltk.downloader {names}")
    similarity, pipeline = spacy_vectors(vectors)
    versions = {name: importlib.import_module(name).__version__ for name in ("nltk", "spacy")}
    return Toolkit(nltk_nouns(nltk), similarity, versions | {"vectors": pipeline})


def nltk_nouns(nltk: Any) -> Callable[[str], list[str]]:
    """What is tagged as a noun, as WordNet's lemma."""
    lemma = nltk.stem.WordNetLemmatizer().lemmatize

    def nouns(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemma(word) for word, tag in tagged if tag.startswith("NN")]

    return nouns


def spacy_vectors(name: str) -> tuple[Callable[[str, str], float], str]:
    """The similarity of two words, and the pipeline's name and version. name: an installed pipeline, or a
    folder. Similarities are kept: pairs of words repeat."""
    spacy: Any = importlib.import_module("spacy")
    if not (spacy.util.is_package(name) or Path(name).is_dir()):
        raise _missing(f"the word vectors {name}", f"python -m spacy download {name}")
    try:
        pipeline = spacy.load(name)
    except Exception as error:  # it may be any package, or any folder
        remedy = "give a spaCy pipeline with --evaluator.vectors"
        raise refusal(name, f"can't be read ({one_line(error, 200)})", remedy) from error
    if not pipeline.vocab.vectors_length:
        raise refusal(name, "has no word vectors", "give a pipeline that has, such as en_core_web_lg")
    doc = cache(pipeline.make_doc)

    @cache
    def similarity(one: str, other: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a word has no vector
            return float(doc(one).similarity(doc(other)))

    meta = pipeline.meta
    return similarity, f"{meta['lang']}_{meta['name']} {meta['version']}"


def _has(nltk: Any, place: str) -> bool:
    try:
        return bool(nltk.data.find(place))
    except LookupError:
        return False


def _missing(what: str, command: str) -> InputError:
    other = "or ask the yes-or-no questions alone: --evaluator.part discriminative"
    return InputError(f"amber's descriptions need {what}; {command}, {other}")
