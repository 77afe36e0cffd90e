"""What a writer wrote: without marks around it, and whether it is a response."""

import pytest

from mllm_align.curation.written import REFUSED, again, cleaned, of_another_length, unusable, words_of


@pytest.mark.parametrize(
    "answer, text",
    [
        (' "Two cats." \n', "Two cats."),
        ("“Two cats.”", "Two cats."),
        ("```\nTwo cats.\n```", "Two cats."),
        ('"Two" and "three"', '"Two" and "three"'),
        ("**Two cats.**", "Two cats."),
    ],
)
def test_marks_around_an_answer_are_taken_off(answer, text):
    assert cleaned(answer, "One cat.") == text
    assert cleaned('"Two."', '"One."') == '"Two."', "as the chosen response has them"


@pytest.mark.parametrize(
    "text, name",
    [
        ("Two cats.", None),
        ("?!", "empty"),
        ("I can't do that.", "refused"),
        ("Sure: two.", "with a heading"),
    ],
)
def test_what_is_no_response(text, name):
    found = unusable("One cat.", text)
    assert (found and found.name) == name
    assert unusable(text, text) is None or name == "empty", "what the chosen response has is no fault"


def test_length_goes_by_words():
    one, ten = words_of("Cat's tail."), words_of("a b c d e f g h i j")
    assert one == ["cat's", "tail"]
    assert of_another_length(one, one + ten[:3], 0.25) is None, "three words more are no fault"
    assert "longer" in of_another_length(one, ten, 0.25).told
    assert of_another_length(ten, ten[:5], 0.5) is None
    assert "shorter" in of_another_length(ten, ten[:5], 0.25).told


def test_again():
    text = again("Write.", 2, "", REFUSED)
    assert text.startswith("Write.") and f"Attempt 2 can't be used: {REFUSED.told}" in text
    assert "(nothing)" in text
