"""GQA: questions about real scenes with one right answer."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.evaluation.base import EVALUATORS, Item, Scored
from mllm_align.evaluation.folders import (
    LMMS_EVAL,
    Prompted,
    ask,
    field,
    find,
    folder_of,
    pictures,
    read_value,
)


@EVALUATORS.register("gqa")
@dataclass(frozen=True)
class Gqa(Prompted):
    """GQA (Hudson & Manning 2019, https://arxiv.org/abs/1902.09506), the balanced questions of test-dev.

    accuracy, in percent: an answer is right if it equals the label once it is stripped, loses a full stop
    at its end and is in lower case, as in LLaVA-1.5's evaluation (scripts/convert_gqa_for_eval.py, then
    GQA's eval.py). The bootstrap draws questions. The preset lmms-eval takes punctuation out of both
    instead.
    """

    presets = {LMMS_EVAL: {"sampling": SamplingConfig(temperature=0.0, max_tokens=16)}}
    fields = ("question_id", "text")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=128)

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        file = find(folder, "testdev_balanced_questions.json", "data/testdev_balanced_questions.json")
        place = pictures(folder, config, "images", "data/images")
        items = []
        for id, row in read_value(file, dict).items():
            where = f"{file} question {id}"
            question, image, answer = (
                field(row, name, str, where) for name in ("question", "imageId", "answer")
            )
            items.append(ask(id, place(f"{image}.jpg"), self.prompt, question, where, answer=answer))
        return items

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        return {"question_id": item.record.id, "prompt": item.record.messages[-1].text, "text": answer}

    def score(self, item: Item, answer: str) -> Scored:
        true = item.labels["answer"]
        right = _bare(answer) == _bare(true) if self.preset == LMMS_EVAL else read(answer) == true
        return Scored({"accuracy": 100.0 * right}, {"answer": true, "right": right})


def read(answer: str) -> str:
    """What is compared with the label."""
    return answer.strip().removesuffix(".").lower()


def _bare(text: str) -> str:
    """What lmms-eval compares: lower case, without ASCII punctuation."""
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))
