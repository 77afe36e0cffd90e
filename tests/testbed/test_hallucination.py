"""Counting against captions whose every claim was checked by hand."""

import numpy as np
import pytest

from mllm_align.testbed import hallucination
from mllm_align.testbed.hallucination import Counts, count, figures, hallucinated_spans, pope_questions
from mllm_align.testbed.scenes.language import caption, yes_or_no
from mllm_align.testbed.scenes.world import KINDS, LESSONS, Scene, Settings, Thing, make_scene, partner

# Left: a small red cup above a large blue key. Right: a large green moon.
SCENE = Scene(
    "by-hand",
    1,
    2,
    (
        (Thing("cup", "red", "small", 0, 0), Thing("key", "blue", "large", 1, 0)),
        (Thing("moon", "green", "large", 0, 3),),
    ),
)
TRUE = (
    "On the left, a small red cup is above a blue key. On the right is a green moon. Nothing else is there."
)


def test_true_caption():
    assert count(SCENE, TRUE) == Counts(
        captions=1,
        mentions=3,
        present=3,
        recalled=3,
        attributes=4,
        places=3,
        relations=1,
        sentences=3,
        words=23,
    )


def test_every_kind_of_error_is_counted_once():
    text = (
        "On the right, a large blue cup is below a blue key. "  # place x2, size, colour, relation
        "On the left, there is a red spoon above a green moon. "  # an expected partner; place of the moon
        "There is a purple boat."  # no partner of it is mentioned
    )
    assert count(SCENE, text) == Counts(
        captions=1,
        mentions=5,
        hallucinated=2,
        with_hallucination=1,
        expected=1,
        present=3,
        recalled=3,
        attributes=4,
        attributes_wrong=2,
        places=3,
        places_wrong=3,
        relations=1,
        relations_wrong=1,
        sentences=3,
        words=29,
    )


def test_repeats_count_as_mentions_but_recall_once():
    counted = count(SCENE, "There is a cup. There is a cup. There is a hat. There is a hat.")
    assert (counted.mentions, counted.hallucinated, counted.recalled) == (4, 2, 1)


def test_a_sentence_that_doubles_a_word_stutters_once():
    text = "At the top, there is a a small small cup. A key. The  The\nthe cup. A cup above a cup. A atlas."
    assert (count(SCENE, text).stuttered, count(SCENE, TRUE).stuttered) == (2, 0)
    assert figures([count(SCENE, "A red red cup. A key."), count(SCENE, TRUE)])["stutter"] == 1 / 5


def test_babble_counts_as_hallucinated():
    counted = count(SCENE, "The the red. Left of above! A cup")
    assert (counted.mentions, counted.hallucinated, counted.unparsed, counted.sentences) == (3, 2, 3, 3)
    assert counted.with_hallucination == 1


def test_empty_caption_recalls_nothing():
    assert count(SCENE, "") == Counts(captions=1, present=3)


def test_denial_is_no_hallucination():
    assert count(SCENE, "There is no hat.").hallucinated == 0


def test_our_own_captions_are_without_fault():
    rng = np.random.default_rng(0)
    scenes = [make_scene("held_out", i, Settings()) for i in range(100)]
    found = figures([count(scene, caption(scene, rng)) for scene in scenes])
    faults = ("chair_i", "chair_s", "attribute_error", "place_error", "relation_error", "unparsed")
    assert found["recall"] == 1 and not any(found[name] for name in faults)


@pytest.mark.parametrize("lesson", LESSONS)
def test_our_own_captions_of_lessons_are_without_fault(lesson):
    rng = np.random.default_rng(0)
    for index in range(50):
        scene = make_scene(lesson, index, Settings())
        text = caption(scene, rng)
        counted = count(scene, text)
        assert counted.mentions == counted.recalled == counted.present == len(set(scene.kinds))
        assert counted.places_wrong == counted.relations_wrong == 0
        wrong = (counted.hallucinated, counted.attributes_wrong, counted.unparsed)
        assert wrong == (0, 0, 0) and not hallucinated_spans(scene, text)
        kind = scene.kinds[0]
        if partner(kind) in scene.kinds:
            continue
        other = count(scene, text.replace(kind, partner(kind)))
        assert (other.hallucinated, other.recalled) == (1, counted.recalled - 1)


def test_expected_partners_in_the_broken_split_are_all_found():
    scenes = [make_scene("broken", i, Settings()) for i in range(50)]
    texts = [f"There is a {s.kinds[0]}. There is a {partner(s.kinds[0])}." for s in scenes]
    found = figures([count(scene, text) for scene, text in zip(scenes, texts, strict=True)])
    assert (found["chair_i"], found["chair_s"], found["expected_share"]) == (0.5, 1, 1)


def test_counts_add_up_and_figures_are_their_ratios():
    one, two = count(SCENE, TRUE), count(SCENE, "There is a hat.")
    both = one + two
    assert (both.captions, both.mentions, both.hallucinated, both.words) == (2, 4, 1, 27)
    found = figures([one, two])
    assert found == figures([both])
    assert found["chair_i"] == 1 / 4 and found["chair_s"] == 1 / 2 and found["recall"] == 3 / 6
    assert found["words"] == 13.5 and found["mentions"] == 2


def test_figures_of_nothing_are_zero():
    assert set(figures([]).values()) == {0.0}


def test_spans_mark_the_words_that_are_wrong():
    text = "A red spoon is above a cup. I saw hats."
    assert [text[a:b] for a, b in hallucinated_spans(SCENE, text)] == ["spoon", "hat"]


def test_intervals_hold_their_figures():
    rng = np.random.default_rng(1)
    scenes = [make_scene("broken", i, Settings()) for i in range(60)]
    texts = [caption(scenes[(i + i % 2) % 60], rng) for i in range(60)]
    counts = [count(scene, text) for scene, text in zip(scenes, texts, strict=True)]
    found = hallucination.intervals(counts)
    for name, value in figures(counts).items():
        assert found[name].mean == pytest.approx(value)
        assert found[name].low <= value <= found[name].high
    assert 0.05 < found["chair_i"].high - found["chair_i"].low < 0.4


def test_pope_is_balanced_and_true():
    rng = np.random.default_rng(0)
    popular = KINDS[::-1]
    for index in range(100):
        scene = make_scene(("unbiased", "regions")[index % 2], index, Settings())
        questions = pope_questions(scene, rng, popular)
        assert {q.mode for q in questions} >= {"random", "popular"}
        assert sum(q.answer for q in questions) * 2 == len(questions)
        for q in questions:
            assert q.answer == (q.kind in scene.kinds) and q.kind in q.question
            assert yes_or_no(q.question) is None
            if q.mode == "adversarial" and not q.answer:
                assert partner(q.kind) in scene.kinds
            if q.mode == "popular" and not q.answer:
                assert q.kind == next(kind for kind in popular if kind not in scene.kinds)


def test_pope_leaves_out_the_mode_that_has_no_vain_thing():
    couple = Scene("x", 1, 2, ((Thing("cup", "red", "small", 0, 0), Thing("spoon", "red", "small", 0, 1)),))
    modes = [q.mode for q in pope_questions(couple, np.random.default_rng(0), ["cup"])]
    assert modes == ["random", "random"]
