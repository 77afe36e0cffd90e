"""Corrupted captions: false in something, the same in all other words, and the same each time."""

import re
from collections import Counter

import numpy as np
import pytest

from mllm_align.testbed.hallucination import count
from mllm_align.testbed.scenes.corrupt import corrupt
from mllm_align.testbed.scenes.language import caption, parse
from mllm_align.testbed.scenes.world import Scene, Settings, Thing, make_scene, partner

CUP, SPOON = Thing("cup", "red", "small", 0, 0), Thing("spoon", "blue", "large", 0, 1)
BELL = Thing("bell", "green", "large", 0, 3)


def captions(number):
    splits = ("train", "held_out", "unbiased", "broken")
    for i in range(number):
        scene = make_scene(splits[i % 4], i, Settings())
        yield scene, caption(scene, np.random.default_rng(i))


def errors(scene, text):
    c = count(scene, text)
    return c.hallucinated, c.attributes_wrong, c.places_wrong, c.relations_wrong


def test_true_captions_become_false_and_stay_in_the_grammar():
    seen = np.zeros(4, int)
    for i, (scene, text) in enumerate(captions(400)):
        changed = corrupt(scene, text, np.random.default_rng(i))
        assert not any(errors(scene, text)) and any(errors(scene, changed))
        seen += np.array(errors(scene, changed)) > 0
        before, after = parse(text), parse(changed)
        assert not after.unparsed and after.sentences == before.sentences
        assert [m.sentence for m in after.mentions] == [m.sentence for m in before.mentions]
        kinds = [m.kind for m in after.mentions]
        assert len(set(kinds)) == len(kinds)
    assert all(seen > 40), seen


def shape(text):
    """The words that no fact hangs on."""
    where = r"\b(on|at|in) the (top |bottom )?(left|right|middle|top|bottom)\b"
    facts = r"\b(red|green|blue|yellow|purple|black|small|large|(left|right) of|above|below|an?)\b"
    text = re.sub(where, "@", text, flags=re.I)
    kinds = {m.kind for m in parse(text).mentions}
    text = re.sub(rf"\b({'|'.join(kinds)})\b", "*", text)
    return re.sub(facts, "", text).split()


def test_all_other_words_stay():
    for i, (scene, text) in enumerate(captions(200)):
        changed = corrupt(scene, text, np.random.default_rng(i))
        assert shape(changed) == shape(text), (text, changed)


def changes(text, changed):
    """How many facts differ; where a pair is counts once."""
    before, after = parse(text), parse(changed)
    both = list(zip(before.mentions, after.mentions, strict=True))
    fields = ("kind", "colour", "size")
    number = sum(getattr(a, field) != getattr(b, field) for a, b in both for field in fields)
    number += len({a.sentence for a, b in both if a.where != b.where})
    return number + sum(a != b for a, b in zip(before.relations, after.relations, strict=True))


@pytest.mark.parametrize("most", [1, 2, 5])
def test_at_most_so_many_facts(most):
    scene = Scene("x", 1, 2, ((CUP, SPOON), (BELL,)))
    text = "On the left, a small red cup is left of a blue spoon. On the right is a green bell."
    numbers = [changes(text, corrupt(scene, text, np.random.default_rng(i), most)) for i in range(60)]
    assert set(numbers) == set(range(1, most + 1))


def test_the_same_each_time():
    for i, (scene, text) in enumerate(captions(20)):
        first, second = (corrupt(scene, text, np.random.default_rng(i)) for _ in range(2))
        assert first == second
    scene, text = next(captions(1))
    assert len({corrupt(scene, text, np.random.default_rng(i)) for i in range(20)}) > 5


def test_many_kinds_become_the_usual_partner_of_what_they_are_named_with():
    scene = Scene("x", 1, 2, ((CUP, BELL),))
    text = "On the left, there is a red cup left of a green bell."
    became = Counter()
    for i in range(400):
        mentions = parse(corrupt(scene, text, np.random.default_rng(i), 1)).mentions
        became += Counter(m.kind for m in mentions if m.kind not in scene.kinds)
    usual = became[partner("cup")] + became[partner("bell")]
    assert 0.4 < usual / became.total() < 0.75 and len(became) > 6


def test_articles_fit():
    scene = Scene("x", 1, 2, ((CUP,),))
    said = {corrupt(scene, "There is a cup.", np.random.default_rng(i)) for i in range(200)}
    assert "There is an arrow." in said and "There is a house." in said
    assert not any("a arrow" in text or "an house" in text for text in said)


def test_what_is_false_already_does_not_become_true():
    scene = Scene("x", 1, 2, ((CUP, SPOON), (BELL,)))
    false = "On the right, a large blue cup is above a red spoon. On the left is a black bell."
    for i in range(100):
        assert (
            sum(errors(scene, corrupt(scene, false, np.random.default_rng(i), 1)))
            >= sum(errors(scene, false)) - 3
        )  # a kind that is not there takes its wrong claims with it
        assert any(errors(scene, corrupt(scene, false, np.random.default_rng(i), 5)))


def test_nothing_to_change_is_an_error():
    with pytest.raises(ValueError, match="claims nothing"):
        corrupt(Scene("x", 1, 1, ()), "Nothing is there.", np.random.default_rng(0))
