"""Scorers for tests of online runs; named in configs as votes:NAME."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mllm_align.annotate.verdict import Question


def hashed(questions: Sequence[Question]) -> list[list[float]]:
    """Arbitrary, but always the same for the same text."""
    return [
        [float(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)) for text in question.responses]
        for question in questions
    ]


def alike(questions: Sequence[Question]) -> list[list[float]]:
    return [[1.0] * len(question.responses) for question in questions]


def short(questions: Sequence[Question]) -> list[list[float]]:
    """The shorter the better."""
    return [[-len(text) / 20 for text in question.responses] for question in questions]
