"""What a writer is asked for, and what of its answers is used."""

from collections import Counter

import pytest
from test_items import read, written

from mllm_align.curation.corruption import KINDS, Asked, fault, kinds_of
from mllm_align.curation.written import REFUSED, SHOWN

LONG = "A brown dog lies on a red sofa beside two white cushions and a lamp."


def asked(tmp_path, kind="counts", **fields):
    row = {"prompt": "Describe it.", "completion": LONG} | fields
    (item,) = read(written(tmp_path, row))
    return Asked(item.record, kind)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_the_examples_are_what_is_asked_for(kind):
    for _, response, changed in kind.examples:
        assert fault(response, changed) is None
    assert len(kind.examples) == 2


def test_kinds_are_balanced_and_follow_from_seed_and_names():
    names = [str(i) for i in range(52)]
    kinds = kinds_of(names, 0)
    assert sorted(Counter(kinds).values()) == [10, 10, 10, 11, 11] and set(kinds) == set(KINDS)
    assert kinds == kinds_of(names, 0) != kinds_of(names, 1)
    assert kinds_of(names[::-1], 0) == kinds[::-1], "the order of the records is nothing to it"


def test_what_is_asked(tmp_path):
    first = asked(tmp_path)
    assert first.record.images == () and first.record.messages[0].text == first.text
    assert KINDS["counts"].told in first.text and KINDS["positions"].told not in first.text
    assert f"Request: Describe it.\nResponse: {LONG}\nNew response:" in first.text
    again = Asked(first.about, "counts", 2, (f"{'x' * SHOWN}yz", REFUSED))
    assert again.text.startswith(first.text) and f"Attempt 1 can't be used: {REFUSED.told}" in again.text
    assert f"{'x' * SHOWN}\n" in again.text
    turns = [{"role": role, "content": text} for role, text in (("user", "Hi."), ("assistant", "Hello."))]
    asked_last = [*turns, {"role": "user", "content": "Describe it."}]
    assert "User: Hi.\nAssistant: Hello.\nUser: Describe it." in asked(tmp_path, prompt=asked_last).text


@pytest.mark.parametrize(
    "text, name",
    [
        (LONG.replace("two", "three"), None),
        (LONG.upper() + "!!", "unchanged"),
        ("", "empty"),
        ("...", "empty"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("As an AI language model, I can't see the image.", "refused"),
        ("Here is the changed response: " + LONG.replace("two", "six"), "with a heading"),
        ("New response:\n" + LONG.replace("two", "six"), "with a heading"),
        ("Sure! Here you go:\n" + LONG.replace("two", "six"), "with a heading"),
        (LONG.replace("two", "six") + " (I changed two to six.)", "explained"),
        (LONG.replace("two", "six") + "\n\nChanges made: two -> six", "explained"),
        (LONG.replace("two", "<image>"), "with a placeholder"),
        (LONG.replace(" beside two white cushions and a lamp", ""), "of another length"),
        (LONG.replace("two", "six") + " " + LONG, "of another length"),
        ("There were many people walking in the rain when our train left at noon.", "another text"),
    ],
)
def test_what_can_not_be_used(text, name):
    found = fault(LONG, text)
    assert (None if found is None else found.name) == name


@pytest.mark.parametrize(
    "chosen, text",
    [
        ("Two.", "Three."),
        ("Sorry, the text can't be read.", "Sorry, the sign can't be seen."),
        ("Answer: two cats.", "Answer: six cats."),
        ("The note: buy milk.", "The note: buy bread."),
        ("Yes, it is.", "No, it is not."),
    ],
)
def test_what_the_chosen_response_has_is_no_fault(chosen, text):
    assert fault(chosen, text) is None
