"""Preferences of a record: how they are given, where they stand in the prompt, what is refused."""

import pytest
from coders import encoder
from published import trl
from refusals import assert_refusal

from mllm_align.data.preferences import conversation
from mllm_align.data.readers import records_from


def turns(preferences, **fields):
    (record,) = records_from([trl(images=[], **fields, preferences=preferences)])
    return [(message.role, message.text) for message in conversation(record)]


ASKED = [("system", "You see."), ("user", "What?"), ("assistant", "A cat."), ("user", "Where?")]
CHAT = [{"role": role, "content": text} for role, text in ASKED]


@pytest.mark.parametrize(
    "preferences, expected",
    [
        ({"user": "Be brief."}, [("user", "Be brief.\nWhat?")]),
        ({"dialogue": "In one word."}, [("user", "What? In one word.")]),
        ({"system": ["Be brief.", "Be kind."]}, [("system", "Be brief.\nBe kind."), ("user", "What?")]),
        ('{"user": "Be brief."}', [("user", "Be brief.\nWhat?")]),
        ({"user": None, "dialogue": []}, [("user", "What?")]),
        (None, [("user", "What?")]),
    ],
)
def test_where_each_tier_stands(preferences, expected):
    assert turns(preferences) == expected


def test_a_conversation_of_several_turns_has_them_once():
    found = turns({"system": "Be brief.", "user": "I like cats.", "dialogue": "Say it."}, prompt=CHAT)
    assert found == [
        ("system", "You see.\nBe brief."),
        ("user", "I like cats.\nWhat?"),
        ("assistant", "A cat."),
        ("user", "Where? Say it."),
    ]


def test_images_that_stand_first_stay_first():
    (record,) = records_from([trl(preferences={"user": "Be brief."})], responses=2)
    (message,) = conversation(record)
    assert [part.text for part in message.content] == [None, "Be brief.\n", "What?"]
    last = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]}
    (record,) = records_from([trl(prompt=[last], preferences={"dialogue": "Briefly."})])
    (message,) = conversation(record)
    assert [part.text for part in message.content] == ["What is this?", None, "Briefly."]


@pytest.mark.parametrize(
    "preferences, said",
    [
        ("Be brief.", "is a text; give an object such as {'user': '...'}"),
        (["Be brief."], "found list; give an object such as"),
        ({"users": "Be brief."}, "has the tier 'users'; give one of system, user, dialogue"),
        ({"user": " "}, "preferences.user: is empty; give its text or leave it out"),
        ({"user": 3}, "preferences.user: found int; give a text or a list of texts"),
        ({"user": [3]}, "preferences.user: found int; give a string"),
        ({"user": "See <image>."}, "preferences.user: <image> in a preference; remove it"),
    ],
)
def test_refusals(preferences, said):
    rows = [trl(images=[], preferences=preferences)]
    assert_refusal(lambda: records_from(rows), "record 0, preferences", said)


def test_the_model_reads_them():
    rows = [trl(images=[], preferences=each) for each in (None, {"user": "gi dan?"})]
    coder = encoder()
    plain, asked = (coder.text(coder.encode(record, 2).prefix) for record in records_from(rows))
    assert "gi dan?\nWhat?" in asked and "gi dan?" not in plain


def test_rows_of_one_response_have_them():
    row = {"prompt": "What?", "completion": "A cat.", "preferences": {"user": "Be brief."}}
    (record,) = records_from([row], responses=1)
    assert record.preferences == (("user", "Be brief."),)
