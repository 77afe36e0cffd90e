"""HallusionBench: the same questions about pictures and their edited copies, with and without a picture."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.errors import refusal
from mllm_align.evaluation.base import EVALUATORS, Context, Item, Scored
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
from mllm_align.evaluation.judged import Judged

QUESTIONS = "HallusionBench.json"
CHECK = "gpt4v_output_gpt_check"
CODES = {"0": "incorrect", "1": "correct", "2": "unclear"}
NAMES = ("category", "subcategory", "set_id", "figure_id", "question_id")
# The published prompt gives the same three texts and asks for the same three words; the others are ours.
TO_JUDGE = """Compare a prediction with the reference answer to the same question, as a teacher would.

Question: {question}
Reference answer: {truth}
Prediction: {answer}

Say "correct" if the prediction does not contradict the reference answer, "incorrect" if it contradicts it,
and "unclear" if the prediction does not commit itself. Reply with that word alone."""


@EVALUATORS.register("hallusionbench")
@dataclass(frozen=True)
class HallusionBench(Prompted, Judged):
    """HallusionBench (Guan et al. 2023, https://arxiv.org/abs/2310.14566): 1,129 yes-or-no questions, 178
    of them without a picture, on 346 pictures. VD: questions that only a picture answers; VS: those that a
    picture adds to.

    Figures, in percent, are those of evaluation.py and utils.py in tianyi-lab/HallusionBench (744007c).
    aAcc: the share of right answers; qAcc: of question pairs (the same question on all pictures of a set,
    and without one) with all answers right; fAcc: of pictures with all answers right; easy: of pairs
    without their questions on edited pictures (visual_input 2), and hard: of pairs with those alone. (The
    README words easy and hard otherwise, but its figures are those of the code: 430 hard pairs.)
    by_category: aAcc of each. with_image: aAcc and qAcc of the 951 questions with a picture, which
    VLMEvalKit and lmms-eval ask alone. The bootstrap draws sets of pictures.

    An answer is read by its words, or by a judge. By its words, as VLMEvalKit does (utils/yorn.py): it is
    "yes" or "no" if it has that word and not the other, and else wrong. A judge (an endpoint, a model,
    --reviews) says correct, incorrect or unclear; unclear is right where a VS question has no picture. The
    published program looks for these words anywhere in a verdict and takes all else for unclear; here the
    first word must be one of them, and a verdict that can't be read is left out, with its pair and its
    picture.
    """

    headline = "aAcc"
    unread = "left out of the figures, with their pairs and pictures"
    fields = ("question_id", "model_prediction")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=128)
    prompt: str = "{question}"

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        file = find(folder, QUESTIONS)
        place = pictures(folder, config, "hallusion_bench", "")
        items = []
        for number, row in enumerate(read_value(file, list)):
            where = f"{file} question {number}"
            labels = {name: field(row, name, str, where) for name in (*NAMES, "visual_input")}
            text, truth = (field(row, name, str, where) for name in ("question", "gt_answer_details"))
            right = field(row, "gt_answer", str, where)
            if right not in ("0", "1") or labels["visual_input"] not in ("0", "1", "2"):
                problem = f"has gt_answer {right!r} and visual_input {labels['visual_input']!r}"
                raise refusal(where, problem, "get the file again")
            labels |= {"answer": truth, "yes": right == "1"}
            seen = labels["visual_input"] != "0"
            name = field(row, "filename", str, where).removeprefix("./") if seen else ""
            picture = place(name.removeprefix("hallusion_bench/"))
            item = ask("_".join(labels[n] for n in NAMES), picture, self.prompt, text, where, **labels)
            items.append(item if seen else _unseen(item))
        unique([item.record.id for item in items], file)
        return items

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        labels = item.labels
        return {
            **{name: labels[name] for name in (*NAMES, "visual_input", "question")},
            "gt_answer_details": labels["answer"],
            "gt_answer": str(int(labels["yes"])),
            "model_prediction": answer,
        }

    def key(self, row: Mapping[str, Any]) -> str:
        return "_".join(str(row[name]) for name in NAMES)

    def group(self, item: Item) -> str:
        return "_".join(item.labels[name] for name in NAMES[:3])

    def score_all(self, items: Sequence[Item], answers: Sequence[str], context: Context) -> list[Scored]:
        said = [yes_or_no(answer) for answer in answers]
        right = [given == item.labels["yes"] for item, given in zip(items, said, strict=True)]
        words = [{"answer": {True: "yes", False: "no", None: "neither"}[given]} for given in said]
        return _figures(items, right, words)

    # ---- a judge -------------------------------------------------------------------------------------

    def to_judge(self, item: Item, answer: str) -> str:
        labels = item.labels
        return TO_JUDGE.format(question=labels["question"], truth=labels["answer"], answer=answer)

    def review(self, item: Item, text: str) -> dict[str, Any]:
        return {**{name: item.labels[name] for name in NAMES}, "content": text}

    def reviews(self, value: Any) -> list[Any]:
        """Rows of `content`, or those that the benchmark's own program writes, with 0, 1 or 2."""
        rows = super().reviews(value)
        if not all(isinstance(row, dict) for row in rows):
            return rows
        return [{"content": CODES.get(str(row.get(CHECK)))} | row for row in rows]

    def review_key(self, row: Mapping[str, Any]) -> str:
        return self.key(row)

    def verdicts(self, items: Sequence[Item], texts: Sequence[str]) -> list[Scored]:
        said = [reading(text) for text in texts]
        right = [_is_right(item, each) for item, each in zip(items, said, strict=True)]
        codes = {word: code for code, word in CODES.items()}
        more = [{CHECK: codes[each]} if each else {CHECK: None, "unparsable": True} for each in said]
        return _figures(items, right, more)


def yes_or_no(answer: str) -> bool | None:
    """Whether an answer says yes; None if it says neither yes nor no, or both."""
    words = set(re.findall(r"\w+", answer.lower()))
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def reading(text: str) -> str | None:
    """What a verdict says, its first word; None if that is no verdict, or the text names another."""
    words = re.findall(r"\w+", text.lower())
    named = [word for word in words if word in CODES.values()]
    return words[0] if words and words[0] in named and len(set(named)) == 1 else None


def _is_right(item: Item, said: str | None) -> bool | None:
    """Without a picture it is right not to know."""
    return None if said is None else said == "correct" or (said == "unclear" and _no_figure(item))


def _no_figure(item: Item) -> bool:
    return item.labels["category"] == "VS" and item.labels["figure_id"] == "0"


def _unseen(item: Item) -> Item:
    """The same without its picture."""
    (turn,) = item.record.messages
    record = replace(item.record, messages=(replace(turn, content=turn.content[1:]),), images=())
    return replace(item, record=record)


PAIR, FIGURE = (*NAMES[:3], NAMES[4]), NAMES[:4]
WHOLE: dict[str, tuple[Sequence[str], Callable[[Item], bool]]] = {
    "qAcc": (PAIR, lambda item: True),
    "fAcc": (FIGURE, lambda item: not _no_figure(item)),
    "easy": (PAIR, lambda item: item.labels["visual_input"] != "2"),
    "hard": (PAIR, lambda item: item.labels["visual_input"] == "2"),
    "with_image/qAcc": (PAIR, lambda item: bool(item.record.images)),
}
"""Figures of groups of questions: the labels that a group has in common, and which questions are taken."""


def _figures(
    items: Sequence[Item], right: Sequence[bool | None], details: Sequence[Mapping[str, Any]]
) -> list[Scored]:
    """right: None where that is not known; then the answer's pair and picture are left out. A group's
    figure stands with its first question."""
    found: list[dict[str, float]] = [{} for _ in items]
    for own, item, good in zip(found, items, right, strict=True):
        if good is not None:
            names = ["aAcc", f"by_category/{item.labels['category']}"]
            names += ["with_image/aAcc"] if item.record.images else []
            own |= dict.fromkeys(names, 100.0 * good)
    for name, (by, takes) in WHOLE.items():
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for place, item in enumerate(items):
            if takes(item):
                groups[tuple(item.labels[each] for each in by)].append(place)
        for places in groups.values():
            goods = [right[place] for place in places]
            if None not in goods:
                found[places[0]][name] = 100.0 * all(goods)
    return [Scored(each, more) for each, more in zip(found, details, strict=True)]
