"""The language: what is written is true and read back exactly; what others write is read fairly."""

import re
from itertools import product

import numpy as np
import pytest

from mllm_align.testbed.scenes import language
from mllm_align.testbed.scenes.language import Relation, caption, parse, place, relation, yes_or_no
from mllm_align.testbed.scenes.world import KINDS, Scene, Settings, Thing, make_scene, partner


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def scenes(count):
    splits = ("train", "held_out", "unbiased", "broken")
    return [make_scene(splits[i % 4], i, Settings()) for i in range(count)]


def everywhere(count):
    return [make_scene("everywhere", i, Settings()) for i in range(count)]


def claims(text):
    return [(m.kind, m.colour, m.size, m.where) for m in parse(text).mentions]


def test_captions_are_read_back_exactly(rng):
    for scene in scenes(400):
        text = caption(scene, rng)
        reading = parse(text)
        assert not reading.unparsed
        assert reading.sentences - len(scene.groups) in (0, 1)
        assert [m.kind for m in reading.mentions] == list(scene.kinds)
        for mention, thing in zip(reading.mentions, scene.things, strict=True):
            assert mention.colour == thing.colour
            assert mention.size in (None, thing.size)
            assert mention.where == place(scene, thing)
            assert text[slice(*mention.span)].lower() == thing.kind
            assert thing in scene.groups[mention.sentence]
        expected, at = [], 0
        for group in scene.groups:
            if len(group) == 2:
                expected.append(Relation(at, str(relation(*group)), at + 1))
            at += len(group)
        assert list(reading.relations) == expected


@pytest.mark.parametrize("lesson", ["regions", "pairs"])
def test_captions_of_lessons_name_what_is_repeated_once(rng, lesson):
    for scene in (make_scene(lesson, i, Settings()) for i in range(100)):
        reading = parse(caption(scene, rng))
        assert not reading.unparsed and len(reading.relations) == (lesson == "pairs") * len(scene.groups)
        for number, group in enumerate(scene.groups):
            said = [m for m in reading.mentions if m.sentence == number]
            kinds = list(dict.fromkeys(thing.kind for thing in group))
            assert [m.kind for m in said] == kinds
            for mention in said:
                thing = scene.find(mention.kind)
                assert thing is not None and mention.where == place(scene, thing)
                assert (mention.colour, mention.size) in product([thing.colour], [None, thing.size])
        for claim in reading.relations:
            things = [scene.find(reading.mentions[i].kind) for i in (claim.first, claim.second)]
            assert claim.relation == relation(*things)  # type: ignore[arg-type]


def test_captions_of_what_is_everywhere_are_read_back_exactly(rng):
    sizes = set()
    for scene in everywhere(100):
        text, thing = caption(scene, rng), scene.things[0]
        reading = parse(text)
        (mention,) = reading.mentions
        assert (mention.kind, mention.colour, mention.where) == (thing.kind, thing.colour, None)
        assert mention.size in (None, thing.size)
        assert (reading.relations, reading.sentences, reading.unparsed) == ((), 1, ())
        assert text.endswith(", again and again.")
        sizes.add(mention.size)
    assert sizes == {None, "small", "large"}


def test_every_template_is_written_and_read(rng):
    """Each sentence of the grammar is matched, and none leaves a slot open."""
    slots = {
        "a": "a small red cup",
        "b": "an arrow",
        "relation": "above",
        "where": "at the top left",
        "kind": "cup",
        "colour": "red",
        "size": "small",
        "absent": "key",
    }
    for name, table in language.GRAMMAR.items():
        for template in table:
            text = template.format(**slots)
            reading = parse(text[0].upper() + text[1:])
            assert not reading.unparsed, text
            silent = name in ("no", "empty", "closing")
            assert [m.kind for m in reading.mentions][:1] == ([] if silent else ["cup"]), text
            assert len(reading.relations) == ("{relation}" in template)


def test_captions_vary_and_stay_short(rng):
    texts = [caption(scene, rng) for scene in scenes(400)]
    sentences = [s for text in texts for s in re.split(r"(?<=\.) ", text)]
    lengths = [len(s.split()) for s in sentences]
    assert max(lengths) <= 16 and 9 < np.mean(lengths) < 13
    vocabulary = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    assert len(vocabulary) < 60
    said = [m.size is not None for text in texts for m in parse(text).mentions]
    assert np.mean(said) == pytest.approx(0.5, abs=0.06)
    closing = [text.endswith(language.GRAMMAR["closing"]) for text in texts]
    assert np.mean(closing) == pytest.approx(0.25, abs=0.08)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", " ".join(texts), re.IGNORECASE)


def test_places_are_named_after_the_grid():
    corner = Scene("x", 2, 2, ((Thing("cup", "red", "small", 3, 0),),))
    assert place(corner, corner.things[0]) == "bottom left"
    row = Scene("x", 1, 2, ((Thing("cup", "red", "small", 1, 2),),))
    assert place(row, row.things[0]) == "right"


def test_relation_needs_one_line():
    cup, key, hat = (
        Thing(k, "red", "small", r, c) for k, r, c in [("cup", 0, 0), ("key", 0, 3), ("hat", 1, 1)]
    )
    assert (relation(cup, key), relation(key, cup), relation(cup, hat)) == ("left of", "right of", None)


def test_presence_says_what_is_true(rng):
    for scene in scenes(40):
        for kind in KINDS:
            qa = language.presence(scene, kind, rng)
            assert kind in qa.question
            assert yes_or_no(qa.answer) is (kind in scene.kinds)
            thing, mentions = scene.find(kind), parse(qa.answer).mentions
            assert [(m.kind, m.colour) for m in mentions] == ([(kind, thing.colour)] if thing else [])


def test_what_where_answers_with_what_is_in_the_region(rng):
    empty = 0
    for scene in scenes(300):
        qa = language.what_where(scene, rng)
        words = re.search(r"(?:on|at|in) the ([a-z ]+)[?.]", qa.question)
        assert words is not None
        there = [thing.kind for thing in scene.things if place(scene, thing) == words[1]]
        reading = parse(qa.answer)
        assert not reading.unparsed
        assert [m.kind for m in reading.mentions] == there
        empty += not there
    assert 10 < empty < 90


@pytest.mark.parametrize("kind", ["colour", "size", "place"])
def test_attribute_answers_are_true_and_parse(rng, kind):
    for scene in scenes(60):
        qa = language.attribute(scene, kind, rng)
        (mention,) = parse(qa.answer).mentions
        thing = scene.find(mention.kind)
        assert thing is not None and thing.kind in qa.question
        truth = {"colour": thing.colour, "size": thing.size, "place": place(scene, thing)}
        said = {"colour": mention.colour, "size": mention.size, "place": mention.where}
        assert said == {name: value if name == kind else None for name, value in truth.items()}


def test_training_rows_are_a_caption_and_balanced_questions(rng):
    rows = [language.training_rows(scene, rng, questions=3) for scene in scenes(400)]
    assert all(len(r) == 4 and r[0].kind == "caption" for r in rows)
    assert {r[0].question for r in rows} == set(language.describe_questions())
    others = [qa for r in rows for qa in r[1:]]
    assert {qa.kind for qa in others} == set(language.QUESTIONS) - {"caption"}
    answers = [yes_or_no(qa.answer) for qa in others if qa.kind == "presence"]
    assert np.mean(answers) == pytest.approx(0.5, abs=0.07)


def test_what_is_everywhere_is_asked_only_whether_a_thing_is_there(rng):
    everything = everywhere(300)
    rows = [language.training_rows(scene, rng, questions=2) for scene in everything]
    answers = []
    for scene, (said, *others) in zip(everything, rows, strict=True):
        assert said.kind == "caption" and said.question in language.describe_questions()
        for qa in others:
            assert qa.kind == "presence"
            (asked,) = (kind for kind in KINDS if re.search(rf"\b{kind}\b", qa.question))
            assert yes_or_no(qa.answer) is (asked in scene.kinds)
            answers.append(yes_or_no(qa.answer))
    assert len(answers) == 600 and np.mean(answers) == pytest.approx(0.5, abs=0.08)


def test_negative_questions_are_not_about_partners_more_than_chance(rng):
    scene = Scene("x", 1, 2, ((Thing("cup", "red", "small", 0, 0),),))
    asked = [
        qa for _ in range(1500) for qa in language.training_rows(scene, rng)[1:] if qa.kind == "presence"
    ]
    absent = [qa for qa in asked if not yes_or_no(qa.answer)]
    share = np.mean([partner("cup") in qa.question for qa in absent])
    assert share == pytest.approx(1 / 15, abs=0.035)


def test_reading_does_not_mind_case_spacing_and_order():
    assert claims("there  is A Red CUP") == [("cup", "red", None, None)]
    assert claims("ON THE LEFT there is a small  arrow") == [("arrow", None, "small", "left")]
    assert claims("We see a red cup above a key at the top  left.") == [
        ("cup", "red", None, "top left"),
        ("key", None, None, "top left"),
    ]
    assert parse("A cup is to the left of the key.").relations == (Relation(0, "left of", 1),)
    assert claims("we see a small cup again and again") == [("cup", None, "small", None)]
    assert claims("There is a red cup. There is a red cup.") == [("cup", "red", None, None)] * 2


def test_reading_finds_things_in_sentences_outside_the_grammar():
    text = "There is a cup. I like big red cups and small keys! The cupboard is bare"
    reading = parse(text)
    assert [(m.kind, m.colour, m.size, m.sentence) for m in reading.mentions] == [
        ("cup", None, None, 0),
        ("cup", "red", None, 1),
        ("key", None, "small", 1),
    ]
    assert [text[slice(*m.span)] for m in reading.mentions] == ["cup", "cup", "key"]
    assert reading.unparsed == ("I like big red cups and small keys!", "The cupboard is bare")
    assert (reading.sentences, reading.relations) == (3, ())


def test_a_caption_cut_off_keeps_what_was_said():
    assert claims("On the left, a red cup is above a small") == [("cup", "red", None, None)]


@pytest.mark.parametrize("text", ["", " ", "...", "\n\n"])
def test_empty_text_has_no_sentences(text):
    assert parse(text) == language.Reading((), (), 0, ())


@pytest.mark.parametrize("text", ["There is no cup.", "No, we see no cup", "there is nothing else."])
def test_denials_mention_nothing(text):
    assert parse(text) == language.Reading((), (), 1, ())


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes.", True),
        (" yes, there is", True),
        ("NO", False),
        ("Nothing.", None),
        ("", None),
        ("A cup? No", None),
    ],
)
def test_yes_or_no(text, verdict):
    assert yes_or_no(text) is verdict
