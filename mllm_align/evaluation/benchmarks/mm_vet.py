"""MM-Vet: answers that need several capabilities at once, graded by a judge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.errors import refusal
from mllm_align.evaluation.base import EVALUATORS, Item, Scored
from mllm_align.evaluation.folders import (
    GUIDE,
    LMMS_EVAL,
    Prompted,
    ask,
    field,
    find,
    folder_of,
    pictures,
    read_lines,
    read_value,
    unique,
)
from mllm_align.evaluation.judged import Judged

OFFICIAL, LLAVA = "mm-vet.json", ("llava-mm-vet.jsonl", "questions.jsonl")
PREFIX = "v1_"
# lmms-eval's. Its task says do_sample: false, so it is greedy here; but it says temperature: 0.2, too, at
# which lmms-eval's wrappers of LLaVA sample all the same.
STEPS = (
    "First please perform reasoning, and think step by step to provide best answer to the following"
    " question: \n\n{question}"
)
# As in the published prompt, marks are explained, graded examples shown, and the last row is to be graded;
# words and examples are ours.
PASS = "How long does the pass hold, and where? | 3 days <AND> zone A <AND> zone B"
SIGN = "What does the sign forbid? | parking <OR> leaving a car"
JOKE = "Why do they laugh? | A cat sits on the speaker's notes <AND> the speaker has not seen it"
TO_JUDGE = f"""Grade a prediction against the true answer to a question about a picture. The grade is a
number from 0.0 (all wrong) to 1.0 (all right), in steps of 0.1. In a true answer <AND> stands between
elements that a right prediction has all of: each counts for its share. <OR> stands between alternatives:
one of them is all that is wanted. Other words for the same thing are as good.

Question | True answer | Prediction | Grade
--- | --- | --- | ---
{PASS} | It holds three days, in the zones A and B. | 1.0
{PASS} | 7 days in zone A. | 0.3
{PASS} | Three days, but I can't read the zones. | 0.3
{SIGN} | You may not park here. | 1.0
{SIGN} | It forbids smoking. | 0.0
{JOKE} | Somebody tells a joke about a dog. | 0.0
{JOKE} | There is a cat on the notes that are on the desk. | 0.5
{{question}} | {{truth}} | {{answer}} |

Reply with the grade of the last row, and nothing else."""


@EVALUATORS.register("mm-vet")
@dataclass(frozen=True)
class MmVet(Prompted, Judged):
    """MM-Vet (Yu et al. 2023, https://arxiv.org/abs/2308.02490): 218 questions.

    A grade is a number from 0.0 to 1.0, the first word of a verdict. score is 100 times the mean over all
    questions; by_category has that over the questions of each capability, which mm-vet.json names: LLaVA's
    file of questions does not. The mean of several runs and their deviation are those of
    mm-vet_evaluator.py, numpy's std. It asks again for what it can't read and then takes 0; here an
    unparsable grade is out of the mean. The bootstrap draws questions.

    A judge is given question, true answer and prediction below graded examples, as by that program; only
    mm-vet.json has the true answers.
    """

    presets = {LMMS_EVAL: {"prompt": STEPS}}
    fields = ("question_id", "text")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=1024)
    prompt: str = "{question}"

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        place = pictures(folder, config, "images")
        file = find(folder, OFFICIAL, *LLAVA)
        asked = _official(file) if file.name == OFFICIAL else _llavas(file)
        return [
            ask(id, place(image), self.prompt, question, f"{file} question {id}", **labels)
            for id, (image, question, labels) in asked.items()
        ]

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        said, id = item.record.messages[-1].text, item.record.id
        return {"question_id": int(id.removeprefix(PREFIX)), "prompt": said, "text": answer}

    def key(self, row: Mapping[str, Any]) -> str:
        return f"{PREFIX}{row['question_id']}"

    def to_judge(self, item: Item, answer: str) -> str:
        labels = item.labels
        if "answer" not in labels:
            problem, remedy = "has no true answer for the judge", f"put {OFFICIAL} beside it: {GUIDE}"
            raise refusal(item.record.where, problem, remedy)
        truth = labels["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return TO_JUDGE.format(question=labels["question"], truth=truth, answer=answer)

    def review(self, item: Item, text: str) -> dict[str, Any]:
        return {"id": item.record.id, "content": text}

    def reviews(self, value: Any) -> list[Any]:
        """Rows, or an object: id -> the grades of all runs, or -> an object whose content has them."""
        if not isinstance(value, dict) or "content" in value:
            return super().reviews(value)
        rows = []
        for id, given in value.items():
            grades = given.get("content", given.get("score")) if isinstance(given, dict) else given
            for run, grade in enumerate(grades if isinstance(grades, list) else [grades], 1):
                number = isinstance(grade, int | float) and not isinstance(grade, bool)
                rows.append({"run": run, "id": id, "content": str(grade) if number else grade})
        return rows

    def review_key(self, row: Mapping[str, Any]) -> str:
        return str(row["id"]) if "id" in row else self.key(row)

    def verdict(self, item: Item, text: str) -> Scored:
        found = grade(text)
        if found is None:
            return Scored({}, {"score": None, "unparsable": True})
        names = ("score", *(f"by_category/{each}" for each in item.labels.get("capability", ())))
        return Scored(dict.fromkeys(names, 100 * found), {"score": found})


def grade(text: str) -> float | None:
    """The grade of a verdict, its first word; None if that is no number from 0 to 1."""
    try:
        found = float(text.split()[0])
    except (IndexError, ValueError):
        return None
    return found if math.isfinite(found) and 0 <= found <= 1 else None


Questions = dict[str, tuple[str, str, dict[str, Any]]]


def _official(file: Path) -> Questions:
    """Id -> (picture, question, labels)."""
    found: Questions = {}
    for id, row in read_value(file, dict).items():
        where = f"{file} question {id}"
        number = id.removeprefix(PREFIX)
        if not (id.startswith(PREFIX) and number.isdecimal()):
            raise refusal(where, "has no id such as v1_0", "get the file again")
        image, question, answer = (
            field(row, name, str, where) for name in ("imagename", "question", "answer")
        )
        capability = field(row, "capability", list, where)
        if not all(isinstance(each, str) and "/" not in each for each in capability):
            raise refusal(f"{where}, capability", "holds no names", "get the file again")
        found[id] = (image, question, {"answer": answer, "capability": sorted(set(capability))})
    return found


def _llavas(file: Path) -> Questions:
    rows, found = read_lines(file), {}
    for number, row in enumerate(rows, 1):
        where = f"{file} row {number}"
        id = f"{PREFIX}{field(row, 'question_id', int, where)}"
        found[id] = (field(row, "image", str, where), field(row, "text", str, where), {})
    unique([row["question_id"] for row in rows], file)
    return found
