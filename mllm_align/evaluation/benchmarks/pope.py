"""POPE: does the model say yes to things that are not there?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.errors import first_few, refusal
from mllm_align.evaluation.base import EVALUATORS, Item, Scored, Statistic
from mllm_align.evaluation.folders import (
    LMMS_EVAL,
    Prompted,
    ask,
    field,
    find,
    folder_of,
    pictures,
    read_lines,
    unique,
)

SPLITS = ("random", "popular", "adversarial")
QUESTIONS = ("questions.jsonl", "llava_pope_test.jsonl")
NO = frozenset(("No", "no", "not"))


def _mean(name: str) -> Statistic:
    return lambda figures: np.mean([figures[f"{each}/{name}"] for each in SPLITS], axis=0)


@EVALUATORS.register("pope")
@dataclass(frozen=True)
class Pope(Prompted):
    """POPE (Li et al. 2023, https://arxiv.org/abs/2305.10355): yes-or-no questions about objects of COCO's
    val2014, in three splits.

    Figures of each split, as fractions: accuracy; precision, recall and F1 of the answer yes; the share of
    yes. mean_accuracy is the paper's summary, mean_f1 LLaVA's. Prompt, settings and reading are those of
    LLaVA-1.5's evaluation (llava/eval/eval_pope.py). Labels join questions by picture and text, as copies
    of POPE differ in both. The bootstrap draws questions.

    The preset lmms-eval reads as lmms_eval/tasks/pope/utils.py does: an answer is yes or no if it is that
    word alone, in any case. Any other is wrong, but counts for neither precision nor recall; and yes_ratio
    is the share of yes among the labels, whatever the model says.
    """

    derived = {"mean_accuracy": _mean("accuracy"), "mean_f1": _mean("f1")}
    ways = {"yes_ratio": 0}
    presets = {LMMS_EVAL: {}}
    fields = ("question_id", "text")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=128)

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        place = pictures(folder, config, "val2014", "images")
        names = {each: f"coco_pope_{each}.json" for each in SPLITS}
        labels = {each: _labels(find(folder, name, f"coco/{name}")) for each, name in names.items()}
        file = next((f for f in map(folder.joinpath, QUESTIONS) if f.is_file()), None)
        asked = _numbered(labels) if file is None else _questions(file)
        _check_joined(asked, labels, file or folder)
        return [
            ask(
                id,
                place(image),
                self.prompt,
                text,
                f"{file or folder} question {id}",
                category=split,
                label=labels[split][image, text],
            )
            for id, (split, image, text) in asked.items()
        ]

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        said = item.record.messages[-1].text
        return {"question_id": int(item.record.id), "prompt": said, "text": answer}

    def score(self, item: Item, answer: str) -> Scored:
        label, split = item.labels["label"], item.labels["category"]
        exact, true = self.preset == LMMS_EVAL, label == "yes"
        said = _exactly(answer) if exact else yes(answer)
        right, both, told = said == true, bool(said and true), said is not None
        figures = {
            "accuracy": float(right),
            "precision": (both, bool(said)),
            "recall": (both, true and told),
            "f1": (2 * both, bool(said) + (true and told)),  # 2 tp + fp + fn
            "yes_ratio": float(true if exact else bool(said)),
        }
        details = {"category": split, "label": label, "right": right}
        return Scored({f"{split}/{name}": each for name, each in figures.items()}, details)


def yes(answer: str) -> bool:
    """How the published scorer reads an answer. What stands before the first full stop, without commas, is
    split at single blanks; it means no if No, no or not is one of the pieces, and yes if not: None, NO and
    an empty answer mean yes."""
    return NO.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))


def _exactly(answer: str) -> bool | None:
    """How lmms-eval reads an answer: None where it is neither word."""
    return {"yes": True, "no": False}.get(answer.lower().strip())


Labels = dict[tuple[str, str], str]
Questions = dict[str, tuple[str, str, str]]


def _labels(file: Path) -> Labels:
    """(picture, question) -> yes or no."""
    labels: Labels = {}
    doubled = []
    for number, row in enumerate(read_lines(file), 1):
        where = f"{file} row {number}"
        key = (field(row, "image", str, where), field(row, "text", str, where))
        label = field(row, "label", str, where)
        if label not in ("yes", "no"):
            raise refusal(f"{where}, label", f"is {label!r}", "it must be yes or no")
        doubled += [f"{key[0]} {key[1]}"] if key in labels else []
        labels[key] = label
    if doubled:
        problem = f"{len(doubled)} questions come several times: {first_few(doubled)}"
        raise refusal(str(file), problem, "keep one row of each")
    if not labels:
        raise refusal(str(file), "has no rows", "get the file again")
    return labels


def _questions(file: Path) -> Questions:
    """Id -> (split, picture, question), of LLaVA's file."""
    rows, found = read_lines(file), {}
    for number, row in enumerate(rows, 1):
        where = f"{file} row {number}"
        split, image = field(row, "category", str, where), field(row, "image", str, where)
        if split not in SPLITS:
            raise refusal(f"{where}, category", f"is {split!r}", f"it must be one of {', '.join(SPLITS)}")
        text = field(row, "text", str, where).partition("\n")[0]
        found[str(field(row, "question_id", int, where))] = (split, image, text)
    unique([row["question_id"] for row in rows], file)
    return found


def _numbered(labels: dict[str, Labels]) -> Questions:
    """The questions of the files of labels, numbered as LLaVA numbers its own: adversarial from 1, random
    from 10,000,001, popular from 20,000,001."""
    first = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}
    return {
        str(first[split] + place): (split, *key)
        for split in first
        for place, key in enumerate(labels[split])
    }


def _check_joined(asked: Questions, labels: dict[str, Labels], where: Path) -> None:
    bare = [id for id, (split, *key) in asked.items() if tuple(key) not in labels[split]]
    if bare:
        problem = f"{len(bare)} of {len(asked)} questions have no label: {first_few(bare)}"
        raise refusal(str(where), problem, "take questions and labels of the same copy of POPE")
    known = set(asked.values())
    left = [f"{s} {' '.join(key)}" for s in SPLITS for key in labels[s] if (s, *key) not in known]
    if left:
        problem = f"{len(left)} labels are of no question: {first_few(left)}"
        raise refusal(str(where), problem, "take questions and labels of the same copy of POPE")
    doubled = [" ".join(each) for each, count in Counter(asked.values()).items() if count > 1]
    if doubled:
        problem = f"{len(doubled)} questions come several times: {first_few(doubled)}"
        raise refusal(str(where), problem, "keep one row of each")
