"""A tiny LLaVA that can read English, and one whose answers a test makes up."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens import FIXTURES
from runs import one_device

from mllm_align.annotate.pairwise import PROMPT
from mllm_align.annotate.verdict import Question
from mllm_align.data.records import Record, parse_record
from mllm_align.models.bundle import Bundle, load
from mllm_align.testbed.demo import make_model

IMAGE = FIXTURES / "images" / "0_L.png"


@cache
def _opened(folder: Path) -> Bundle:
    sizes = {"image_size": 28, "layers": 1, "vision_layers": 2}
    make_model(folder, "llava", corpus=[PROMPT] * 3, **sizes)
    return load(folder, "float32", one_device())


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Bundle:
    """Import it into a test module; all modules share one."""
    return _opened(tmp_path_factory.getbasetemp() / "judge")


@pytest.fixture
def answering(monkeypatch) -> Callable[[Callable[[Record], str]], list[dict[str, Any]]]:
    """answering(say): models say that of each record; the calls are put down in what it returns."""

    def answering(say: Callable[[Record], str]) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def respond(decoder, encoder, records, sampling, what=None, done=None):
            calls.append({"decoder": decoder, "records": records, "sampling": sampling, "what": what})
            texts = [say(each.record) for each in records]
            ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            tokens = [[np.array([*each, encoder.end], np.int32)] for each in ids]
            for place, each in enumerate(tokens if done else ()):
                done(place, each)
            return tokens

        monkeypatch.setattr("mllm_align.generation.respond.respond", respond)
        return calls

    return answering


def record(name: str = "r0", images: int = 1, **fields: Any) -> Record:
    row = {"id": name, "prompt": "What do you see?", "images": [str(IMAGE)] * images}
    row |= {"chosen": "A cat.", "rejected": "A dog."} | fields
    return parse_record(row, index=0, where="rows", root=None)


def question(*responses: str, **fields: Any) -> Question:
    return Question(record(**fields), responses or ("A cat.", "A dog."))


def shown_first(asked: Record) -> str:
    """The response that a comparison shows first."""
    text = asked.messages[0].text
    return text.split("Response 1:\n")[1].split("\n\nResponse 2:")[0]


def likes(*words: str) -> Callable[[Record], str]:
    """A judge that prefers what has the first of these words that only one response has."""

    def say(asked: Record) -> str:
        second = asked.messages[0].text.split("Response 2:\n")[1].split("\n\nWhich")[0]
        for word in words:
            if (word in shown_first(asked)) != (word in second):
                return f"Response {1 if word in shown_first(asked) else 2}\nIt has {word}."
        return "Tie"

    return say
