"""What a writer is asked who rewrites, and how its review is read."""

import pytest
from test_items import read, written

from mllm_align.curation.rewriting import Review, Rewriting, approved, fault, objection

LONG = "A brown dog lies on a red sofa beside two white cushions and a lamp."


def test_what_is_asked(tmp_path):
    (item,) = read(written(tmp_path, {"prompt": "Describe it.", "completion": LONG}))
    first = Rewriting(item.record)
    assert first.record.messages[0].text == first.text and first.record.images == ()
    assert f"Request: Describe it.\nResponse: {LONG}\nNew response:" in first.text
    bad = fault(LONG, "")
    again = Rewriting(item.record, 2, ("", bad))
    assert again.text.startswith(first.text) and "Attempt 1 can't be used: it is empty" in again.text
    review = Review(item.record, "The dog is brown.")
    assert f"Response: {LONG}\nNew response: The dog is brown.\n" in review.text
    assert review.record.id == item.record.id


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("Yes", True),
        ("\n**Yes**\nAll is there.", True),
        ("No. The lamp is gone.", False),
        ("no, it adds a cat", False),
        ("Not quite.", None),
        ("I think so: yes", None),
        ("", None),
    ],
)
def test_a_review_is_read_strictly(answer, verdict):
    assert approved(answer) is verdict


def test_an_objection_goes_back_to_the_writer():
    bad = objection("No\nThe lamp is gone.")
    assert bad.name == "not approved" and "(The lamp is gone)" in bad.told
    assert "(no reason given)" in objection("No").told


@pytest.mark.parametrize(
    "text, name",
    [
        (LONG, None),
        ("Two white cushions and a lamp are beside a brown dog on a red sofa.", None),
        ("A dog.", "of another length"),
        ("Sure! Here it is: " + LONG, "with a heading"),
    ],
)
def test_what_can_not_be_used(text, name):
    found = fault(LONG, text)
    assert (found and found.name) == name
