"""AMBER's discriminative part: yes or no about existence, attributes and relations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.errors import first_few, refusal
from mllm_align.evaluation.base import EVALUATORS, Item, Scored, Statistic
from mllm_align.evaluation.folders import (
    Prompted,
    ask,
    field,
    find,
    folder_of,
    pictures,
    read_value,
    unique,
)

KINDS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",
}


def _f1(group: str, small: float) -> Statistic:
    def value(figures: Any) -> np.ndarray:
        precision, recall = (
            np.round(figures[f"{group}{name}"], 1) / 100 for name in ("precision", "recall")
        )
        return 100 * 2 * precision * recall / (precision + recall + small)

    return value


@EVALUATORS.register("amber-discriminative")
@dataclass(frozen=True)
class AmberDiscriminative(Prompted):
    """The yes-or-no questions of AMBER (Wang et al. 2023, https://arxiv.org/abs/2311.07397).

    In percent, over all and by existence, attribute and relation: accuracy; precision and recall of the
    answer no; F1 of these as rounded to a digit, with 0.0001 in the denominator (0.001 for existence), as
    in AMBER's inference.py. Only answers that are exactly Yes or No count as such: any other is wrong, and
    no answer of no. The prompt for short answers is LLaVA's, as AMBER has none. The bootstrap draws
    questions.
    """

    derived = {"f1": _f1("", 1e-4), "existence/f1": _f1("existence/", 1e-3)} | {
        f"{group}/f1": _f1(f"{group}/", 1e-4) for group in ("attribute", "relation")
    }
    folder = "amber"
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=128)

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        place = pictures(folder, config, "image", "images")
        asked = find(folder, "query_all.json", "query/query_all.json")
        labelled = find(folder, "annotations.json", "data/annotations.json")
        labels = _by_id(labelled)
        items, bare = [], []
        for id, row in _by_id(asked).items():
            label = labels.get(id)
            if label is None:
                bare.append(id)
            elif label.get("type") != "generative":
                where = f"{asked} question {id}"
                image, question = (field(row, name, str, where) for name in ("image", "query"))
                items.append(
                    ask(id, place(image), self.prompt, question, where, **_label(label, labelled, id))
                )
        if bare:
            problem = f"{len(bare)} questions have no label: {first_few(bare)}"
            raise refusal(str(labelled), problem, "get both files again")
        left = [id for id in labels if labels[id].get("type") != "generative"]
        if len(left) != len(items):
            known = {item.record.id for item in items}
            left = [id for id in left if id not in known]
            problem = f"{len(left)} labels are of no question: {first_few(left)}"
            raise refusal(str(labelled), problem, "get both files again")
        return items

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        return {"id": int(item.record.id), "response": answer}

    def score(self, item: Item, answer: str) -> Scored:
        true, group = item.labels["label"], item.labels["group"]
        right, said_no, no = (
            answer.lower() == true and answer in ("Yes", "No"),
            answer == "No",
            true == "no",
        )
        figures = {
            "accuracy": 100.0 * right,
            "precision": (100 * (said_no and no), said_no),
            "recall": (100 * (said_no and no), no),
        }
        both = figures | {f"{group}/{name}": each for name, each in figures.items()}
        return Scored(both, {"group": group, "label": true, "right": right})


def _by_id(file: Any) -> dict[str, dict[str, Any]]:
    rows = read_value(file, list)
    ids = [str(field(row, "id", int, f"{file} row {n}")) for n, row in enumerate(rows, 1)]
    unique(ids, file)
    return dict(zip(ids, rows, strict=True))


def _label(row: dict[str, Any], file: Any, id: str) -> dict[str, str]:
    where = f"{file} label {id}"
    kind, true = field(row, "type", str, where), field(row, "truth", str, where)
    if kind not in KINDS or true not in ("yes", "no"):
        raise refusal(where, f"is {true!r} of type {kind!r}", "get the file again")
    return {"group": KINDS[kind], "label": true}
