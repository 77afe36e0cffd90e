"""The benchmark of stated preferences: answers have the forms asked for, and are told apart."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import stated_preferences
from scenes_study.forms import FORMS, UNSEEN, WORDINGS, answer, form_of

from mllm_align.data.preferences import TIERS
from mllm_align.testbed.hallucination import count
from mllm_align.testbed.scenes.builder import make_example
from mllm_align.testbed.scenes.world import Settings


@pytest.fixture(scope="module")
def examples():
    made = (make_example("unbiased", number, Settings()) for number in range(20))
    return [each for each in made if not each.scene.repeats]


def test_answers_are_true_and_of_their_form(examples):
    for example in examples:
        for form in FORMS:
            text = answer(example.scene, form, np.random.default_rng(0))
            counts = count(example.scene, text)
            assert form_of(text) == form, text
            wrong = counts.hallucinated, counts.attributes_wrong, counts.places_wrong, counts.unparsed
            assert wrong == (0, 0, 0, 0), text


@pytest.mark.parametrize(
    "text", ["", "Blah.", "The cup is red. The cup is at the top.", "The cup is red. blah."]
)
def test_a_mixture_has_no_form(text):
    assert form_of(text) is None


def test_records_state_the_form_and_sometimes_a_conflict(examples):
    drawn = [(each, np.random.default_rng(i)) for i, each in enumerate(examples * 10)]
    made, seen = [row for each in drawn for row in stated_preferences.rows(*each)], set()
    for row in made:
        stated, form = row["preferences"], row["id"].rpartition("-")[2]
        seen.add(tuple(stated))
        assert next(iter(stated.values())) in WORDINGS[form] and form_of(row["completion"]) == form
        assert len(stated) == 1 or stated["user"] not in WORDINGS[form]
    assert seen == {*((tier,) for tier in TIERS), ("system", "user")}


def test_wordings_are_apart():
    every = [text for each in (WORDINGS, UNSEEN) for texts in each.values() for text in texts]
    assert len(every) == len(set(every)) and tuple(UNSEEN) == FORMS


def test_what_is_measured(examples, monkeypatch):
    """A model that follows the user alone."""

    scenes = {e.png: e.scene for e in examples}
    forms = {text: f for each in (WORDINGS, UNSEEN) for f, texts in each.items() for text in texts}

    def obeys(_, asked, *__, **___):
        about = ((scenes[row["images"][0]["bytes"]], forms[row["preferences"]["user"]]) for row in asked)
        return [[answer(*each, np.random.default_rng(0))] for each in about]

    monkeypatch.setattr(stated_preferences, "generate", obeys)
    found = stated_preferences.measure(None, examples, 0)
    for name in ("trained wordings", "other wordings"):
        assert set(found[name]["followed"].values()) == {1.0} and found[name]["length_ratio"] > 2
        assert found[name]["brief_flips_to_everything"] == 1.0
    assert found["system_wins"] == 0.0
