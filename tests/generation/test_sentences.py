"""Sentences of texts as chat models write them, and the promises that hold for any text."""

import random

import pytest

from mllm_align.generation.sentences import split, yes_no

# each text with " | " put between its sentences in place of a space, or "|" where there is none
TEXTS = [
    "A man rides a horse. | The horse is brown.",
    "No stop at the end",
    "Is that a cat?! | Yes, it is.",
    "Hmm... I see a cat. | Good.",
    "I think... | The cat is black.",
    "the cat sat. | the dog ran.",
    "What a day!|It rained.",
    # abbreviations, initials, numbers
    "Mr. Smith holds a cup. | Mrs. Jones doesn't.",
    "It shows fruits, e.g. apples and pears. | They are ripe.",
    "The largest, i.e. the elephant, is grey. | It eats.",
    "The sign says U.S. Route 66. | It is old.",
    "The clock shows 9 a.m. on the wall. | Nobody is there.",
    "The clock shows 9 a.m. | The street is empty.",
    "It is cats vs. dogs. | Dogs win.",
    "Bus No. 5 is red. | It stops.",
    "J. R. R. Tolkien wrote it. | It is long.",
    "There are cups, plates, etc. on it. | All are white.",
    "On Jan. 5 it rained. | On Feb. 6 it snowed.",
    "Fig. 3 shows St. Paul's Cathedral. | It is tall.",
    "The bar is 3.5 metres long. | It is steel.",
    "Python 3.11.2 runs. | So does 3.12.",
    "It costs $5. | That is cheap.",
    "See https://example.com/a.b?c=d. | It is a page.",
    # quotes, brackets and marks behind a stop
    'She said "Stop." | Then she left.',
    "The sign reads “Open.” | A man enters.",
    'He said: "It is a cat. It is black." | Then he left.',
    "(The sky is blue.) | The sea is calm.",
    "He sat. | (It was late.) | [So late.] | Then he left.",
    "A dog (brown, approx. 3 years old) sits. | It waits.",
    "**Cat.** | The cat is black. | *Nice.* | It sleeps.",
    # other scripts, emoji
    "这是一只猫。|它在睡觉！|真的吗？|是的",
    "यह एक बिल्ली है। | यह सो रही है।",
    "A cat 🐱! | And a dog 🐶. | Fun",
    "A cat sits. | 🐱 It purrs.",
    # items within a line
    "It shows the following: | 1. A cat. | 2. A dog.",
    "How many? | 5.",
    "A.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_stops(text):
    wanted = [part.strip() for part in text.split("|")]
    text = text.replace(" | ", " ").replace("|", "")
    assert [text[start:stop] for start, stop in split(text)] == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1. A cat\n2. A dog", ["1. A cat", "2. A dog"]),
        ("1) A cat sits. It sleeps.\n2) A dog.", ["1) A cat sits.", "It sleeps.", "2) A dog."]),
        ("(a) a cat\n(b) a dog", ["(a) a cat", "(b) a dog"]),
        ("- A red car\n* Two people.\n• A tree", ["- A red car", "* Two people.", "• A tree"]),
        ("Objects:\nred and blue cups", ["Objects:", "red and blue cups"]),
        ("## Title\nSome text here. More.", ["## Title", "Some text here.", "More."]),
        ("A first paragraph\n\nand a second one.", ["A first paragraph", "and a second one."]),
        ("One.\r\nTwo\r\nThree\r\n\r\nfour\rFive", ["One.", "Two", "Three", "four", "Five"]),
        # wrapped text goes on in lower case
        ("The man is\nwearing a hat. He\r\nsmiles.", ["The man is\nwearing a hat.", "He\r\nsmiles."]),
        ("- a long\n  item\n- another", ["- a long\n  item", "- another"]),
        ("  Leading space. Then more.  ", ["Leading space.", "Then more."]),
        # what has no word belongs to a neighbour
        ("---\nA cat.\n***\nA dog. 🐶", ["---\nA cat.\n***", "A dog. 🐶"]),
        *[(text, []) for text in ("", " \n ", "...", " - \n?!", "🐱")],
    ],
)
def test_lines(text, wanted):
    assert [text[start:stop] for start, stop in split(text)] == wanted


def test_spans_hold_all_but_white_space_of_any_text():
    parts = [*'.!?()[]"”“’:;*#…。？「」aBéÉ中1🐱-\\\0 \n\r\t\u00a0\u2028\u3000\u200b\u0301']
    parts += ["2.", "1.5", "No.", "Mr.", "e.g.", "U.S.", "J.", "1. ", "- ", ". ", ".\n"]
    draw = random.Random(0)
    for _ in range(5000):
        text = "".join(draw.choices(parts, k=draw.randrange(25)))
        spans = split(text)
        assert bool(spans) == any(c.isalnum() for c in text), repr(text)
        end = 0
        for start, stop in spans:
            assert end <= start < stop <= len(text), repr(text)
            assert not text[end:start].strip(), repr(text)
            assert text[start:stop] == text[start:stop].strip(), repr(text)
            end = stop
        assert not spans or not text[end:].strip(), repr(text)


def test_long_lines():
    assert split("中" * 30_000) == [(0, 30_000)]
    assert len(split("Ein Kätzchen schläft. " * 2000)) == 2000


def test_yes_no():
    assert yes_no("Yes, there is.") == (0, 3, "No")
    assert yes_no(" \nno cat here") == (2, 4, "yes")
    assert yes_no("No.") == (0, 2, "Yes")
    assert yes_no("yes") == (0, 3, "no")
    assert yes_no("No. 5 is red.") == (0, 2, "Yes")  # accepted
    for other in ("Not here", "None", "Nobody", "Yesterday", "No-one", "YES", "Is it? Yes.", ""):
        assert yes_no(other) is None
