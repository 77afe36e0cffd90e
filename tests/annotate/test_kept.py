"""Answers on disk; what the endpoint does with them is tested with it."""

import json
import random

import pytest
from mutants import mutant

from mllm_align.annotate.kept import Kept
from mllm_align.errors import InputError


@pytest.mark.parametrize("count", [200])
def test_hostile_answers(tmp_path, count):
    rng, good = random.Random(0), json.dumps({"key": "a", "answer": "b"})
    for number in range(count):
        hostile = mutant(good, rng)
        (tmp_path / "answers-00003.jsonl").write_bytes(hostile + b"\n" + good.encode() + b"\n")
        try:
            kept = Kept(tmp_path, 0)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(text, str) for pair in kept.answers.items() for text in pair), number
