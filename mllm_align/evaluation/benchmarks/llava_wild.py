"""LLaVA-Bench (In-the-Wild): answers rated by a judge beside those of a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.data.records import Message, Record
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
    unique,
)
from mllm_align.evaluation.judged import Judged

QUESTIONS, COUNT = "questions.jsonl", 60
REFERENCES, CAPTIONS = "answers_gpt4.jsonl", "context.jsonl"
PREFIX = "llava_bench_"
CATEGORIES = tuple(PREFIX + each for each in ("conv", "detail", "complex"))
UNREAD = [-1.0, -1.0]
# The parts and their order are those of the published prompt; the words are ours.
TO_JUDGE = """Two assistants answered a user's question about a picture. You can't see it; it is described.

[Description]
{caption}

[Question]
{question}

[Assistant 1]
{reference}
[End of Assistant 1]

[Assistant 2]
{answer}
[End of Assistant 2]

[Your task]
Give each answer a score from 1 to 10, the higher the better. Weigh how helpful, relevant and accurate it is
and how much detail it gives, as far as the question asks for that. Take the description as the truth about
the picture. Which answer comes first shall not matter.

Write on the first line nothing but two numbers with a space between them: the score of Assistant 1, then
that of Assistant 2. Give your reasons from the second line on, without favour to either."""


@EVALUATORS.register("llava-wild")
@dataclass(frozen=True)
class LlavaWild(Prompted, Judged):
    """LLaVA-Bench in the wild (Liu et al. 2023, https://arxiv.org/abs/2304.08485): 60 questions on 24
    pictures, in conversation, description and reasoning.

    A verdict's first line holds two numbers from 1 to 10, by comma or space: the reference's score and the
    model's. score and by_category, in percent: the sum of the model's by the sum of the reference's, as in
    llava/eval/summarize_gpt_review.py, but not rounded in between. Any other first line is unparsable: -1
    and -1 in the file of verdicts, as there, but out of the sums. The bootstrap draws questions.

    A judge reads what llava/eval/eval_gpt_review_bench.py shows it: description of the picture, question,
    the reference's answer, the model's.
    """

    presets = {LMMS_EVAL: {"sampling": SamplingConfig(temperature=0.0, max_tokens=4096)}}
    fields = ("question_id", "text")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=1024)
    prompt: str = "{question}"

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        file, place = find(folder, QUESTIONS), pictures(folder, config, "images")
        rows, items = read_lines(file), []
        references = _texts(folder / REFERENCES, "question_id", "text")
        captions = _texts(folder / CAPTIONS, "image", "caption")
        for number, row in enumerate(rows, 1):
            where = f"{file} row {number}"
            id = str(field(row, "question_id", int, where))
            image, text, kind = (field(row, name, str, where) for name in ("image", "text", "category"))
            labels = {"category": _category(PREFIX + kind.removeprefix(PREFIX), where)}
            beside = {"reference": references.get(id), "caption": captions.get(image)}
            labels |= {name: each for name, each in beside.items() if each is not None}
            items.append(ask(id, place(image), self.prompt, text, where, **labels))
        unique([row["question_id"] for row in rows], file)
        return items

    def to_judge(self, item: Item, answer: str) -> str:
        labels = item.labels
        for name, file in (("reference", REFERENCES), ("caption", CAPTIONS)):
            if name not in labels:
                remedy = f"put {file} beside the questions: {GUIDE}"
                raise refusal(item.record.where, f"has no {name} for the judge", remedy)
        return TO_JUDGE.format(
            caption=labels["caption"],
            question=labels["question"],
            reference=labels["reference"],
            answer=answer,
        )

    def review(self, item: Item, text: str) -> dict[str, Any]:
        return {
            "question_id": int(item.record.id),
            "category": item.labels["category"],
            "content": text,
        }

    def reviewed(self, data: Any, config: DataConfig, rows: list[dict[str, Any]]) -> list[Item]:
        """Without the file of questions, they are those numbered 0 to 59, in the categories that the
        verdicts name."""
        folder = folder_of(data)
        if (folder / QUESTIONS).is_file():
            return self.items(data, config)
        found = {}
        for number, row in enumerate(rows, 1):
            where = f"verdict {number}"
            category = _category(field(row, "category", str, where), where)
            found.setdefault(str(row.get("question_id")), category)
        said = Message("user", ())
        return [
            Item(Record(id, (said,), (), (), f"question {id}"), {"category": found.get(id)})
            for id in map(str, range(COUNT))
        ]

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        said = item.record.messages[-1].text
        return {"question_id": int(item.record.id), "prompt": said, "text": answer}

    def verdict(self, item: Item, text: str) -> Scored:
        category, pair = item.labels["category"], scores(text)
        if pair is None:
            return Scored({}, {"category": category, "tuple": UNREAD, "unparsable": True})
        figure = (100 * pair[1], pair[0])
        return Scored(
            {"score": figure, f"by_category/{category}": figure},
            {"category": category, "tuple": list(pair)},
        )


def scores(text: str) -> tuple[float, float] | None:
    """The reference's score and the model's of a verdict; None if its first line has anything else."""
    words = text.partition("\n")[0].replace(",", " ").split()
    try:
        reference, model = map(float, words)
    except ValueError:
        return None
    return (reference, model) if 1 <= reference <= 10 and 1 <= model <= 10 else None


def _texts(file: Path, name: str, text: str) -> dict[str, str]:
    """The texts of a file by their names; none without the file."""
    found: dict[str, str] = {}
    rows = read_lines(file) if file.is_file() else []
    for number, row in enumerate(rows, 1):
        value = field(row, text, str | list, f"{file} row {number}")
        key = str(field(row, name, str | int, f"{file} row {number}"))
        found[key] = value if isinstance(value, str) else "\n".join(map(str, value))
    unique([str(row[name]) for row in rows], file)
    return found


def _category(name: str, where: str) -> str:
    if name not in CATEGORIES:
        raise refusal(f"{where}, category", f"is {name!r}", f"it must be one of {', '.join(CATEGORIES)}")
    return name
