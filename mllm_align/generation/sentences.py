"""Sentence boundaries of a response, and sentences that start with yes or no.

sentencex, with its English rules, decides which full stops end a sentence (abbreviations, initials,
decimals, quotations, CJK stops). Rules here handle the format of chat models' answers: lines, list items,
marks after a full stop. Sentences are spans of the original text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import sentencex

_GAP = re.compile(r"\s+")
_LINE_BREAK = re.compile(r"\r\n?|\n")
# the start of a list item or a heading: "- ", "1. ", "b) ", "(2) ", "## "
_ITEM = re.compile(r"(?:[-*+•–]|#{1,6}|\(?(?:\d{1,3}|[A-Za-z])[.):])\s+")
# a number that sentencex assigns to one sentence but that starts the next: "as follows: 1. A cat."
_NUMBER = re.compile(r"(?:^|(?<=[.!?:;]\s))\(?\d{1,3}[.)]\s*$")
# a whole sentence in brackets
_BRACKETED = re.compile(r"\s*[(\[][^()\[\]]*[.!?…][)\]]\s+")
_CLOSING = re.compile(r"(?<=\S)[*_\"'”’»)\]]+(?=\s|$)")
# The paper's expression lacks the word boundary: it would swap the start of "Not", "None" and "Nobody".
_YES_NO = re.compile(r"\s*(Yes|yes|No|no)\b(?!-\w)")
_OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


def split(text: str) -> list[tuple[int, int]]:
    """Spans [start, stop) of the sentences in characters, in order; only white space separates them.

    A blank line ends a sentence. So does a line break, unless the next line starts in lower case (wrapped
    text). The mark or number of a list item belongs to the item's first sentence. A piece without letters
    and digits ("---", an emoji) belongs to the sentence before it, or at the start to the one after it. A
    text without any letter or digit has no sentences.
    """
    spans: list[tuple[int, int]] = []
    for start, stop in _pieces(text):
        if spans and not (_has_word(text, start, stop) and _has_word(text, *spans[-1])):
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
    return spans if any(_has_word(text, *span) for span in spans) else []


def yes_no(sentence: str) -> tuple[int, int, str] | None:
    """(start, stop, opposite) if the sentence starts with the word yes or no, else None.

    The opposite has the same case. "No. 5 is red" counts as a no: only its meaning shows the difference.
    """
    found = _YES_NO.match(sentence)
    return (*found.span(1), _OPPOSITE[found[1]]) if found else None


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the text between two cuts, stripped of white space; empty ones are omitted."""
    for start, stop in _lines(text):
        item = _ITEM.match(text, start, stop)
        body = item.end() if item else start
        cuts = [body + cut for cut in _cuts(text[body:stop])]
        for left, right in pairwise([start, *cuts, stop]):
            piece = text[left:right]
            content = piece.strip()
            if content:
                left += len(piece) - len(piece.lstrip())
                yield left, left + len(content)


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the lines; lines of wrapped text count as one."""
    start = 0
    for gap in _GAP.finditer(text):
        breaks = len(_LINE_BREAK.findall(gap[0]))
        wrapped = text[gap.end() : gap.end() + 1].islower() and not _ITEM.match(text, gap.end())
        wrapped = wrapped and text[gap.start() - 1 : gap.start()] != ":"
        if breaks > 1 or (breaks and not wrapped):
            yield start, gap.start()
            start = gap.end()
    yield start, len(text)


def _cuts(line: str) -> Iterator[int]:
    """Increasing positions in (0, length of the line] at which sentences end."""
    last = 0
    plain = re.sub(r"\s", " ", line)  # sentencex panics on some multi-byte white space, such as U+2028
    for boundary in sentencex.get_sentence_boundaries("en", plain):  # type: ignore[attr-defined]
        end = boundary["end_index"]
        while (bracketed := _BRACKETED.match(line, last)) and bracketed.end() < end:
            last = bracketed.end()
            yield last
        if closing := _CLOSING.match(line, end):
            end = closing.end()
        if number := _NUMBER.search(line[last:end]):
            end = last + number.start()
        if last < end <= len(line):
            last = end
            yield last


def _has_word(text: str, start: int, stop: int) -> bool:
    return any(character.isalnum() for character in text[start:stop])
