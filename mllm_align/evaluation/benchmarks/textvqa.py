"""TextVQA: questions whose answers are read off the picture; and the VQA accuracy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_align.config.parts import DataConfig, SamplingConfig
from mllm_align.errors import first_few, refusal
from mllm_align.evaluation.base import EVALUATORS, Item, Scored
from mllm_align.evaluation.folders import (
    LMMS_EVAL,
    SHORT,
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

LABELS, QUESTIONS = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"


@EVALUATORS.register("textvqa")
@dataclass(frozen=True)
class TextVqa(Prompted):
    """TextVQA (Singh et al. 2019, https://arxiv.org/abs/1904.08920), 5,000 questions of the validation set.

    accuracy, in percent, is the VQA accuracy of `vqa_accuracy`. LLaVA-1.5's published figures come with the
    words that an OCR system read in the picture; its file of questions has them. Answers are named as by
    LLaVA: question_id is the picture's, and the prompt's question tells which (llava/eval/eval_textvqa.py).
    The bootstrap draws questions. The preset lmms-eval is without those words, puts a question with a
    capital first and small letters behind, and sets no limit of its own: 1,024 tokens is that of its
    wrappers of LLaVA.
    """

    presets = {LMMS_EVAL: {"ocr": False, "sampling": SamplingConfig(temperature=0.0, max_tokens=1024)}}
    fields = ("question_id", "text")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=128)
    prompt: str = SHORT
    """What is put to the model; {question} stands for the question, and for the words read."""
    ocr: bool = True
    """Give the model the words that LLaVA's file of questions has."""

    def items(self, data: Any, config: DataConfig) -> list[Item]:
        folder = folder_of(data)
        file = find(folder, LABELS)
        place = pictures(folder, config, "train_images", "images")
        read = _words_read(folder) if self.ocr else {}
        items, keys = [], []
        for number, row in enumerate(field(read_value(file, dict), "data", list, str(file)), 1):
            where = f"{file} question {number}"
            image, question = (field(row, name, str, where) for name in ("image_id", "question"))
            answers = field(row, "answers", list, where)
            if len(answers) != 10 or not all(isinstance(each, str) for each in answers):
                raise refusal(f"{where}, answers", f"are {len(answers)}", "there must be ten texts")
            key = _key(image, question)
            prompt = self.prompt.replace("{question}", "{question}" + read.get(key, ""))
            if self.preset == LMMS_EVAL:
                question = question.capitalize()
            keys.append(key)
            labels = {"image_id": image, "answers": answers}
            items.append(ask(key, place(f"{image}.jpg"), prompt, question, where, **labels))
        unique(keys, file)
        bare = [key for key in keys if key not in read] if self.ocr else []
        if bare:
            problem = f"{len(bare)} of {len(keys)} questions are not in it: {first_few(bare)}"
            raise refusal(str(folder / QUESTIONS), problem, "get it again, or give --evaluator.no-ocr")
        return items

    def row(self, item: Item, answer: str) -> dict[str, Any]:
        prompt = item.record.messages[-1].text
        return {"question_id": item.labels["image_id"], "prompt": prompt, "text": answer}

    def key(self, row: Mapping[str, Any]) -> str:
        return _key(row["question_id"], _question(str(row["prompt"])))

    def score(self, item: Item, answer: str) -> Scored:
        answers = item.labels["answers"]
        found = vqa_accuracy(answer, answers)
        return Scored({"accuracy": 100 * found}, {"answers": answers, "accuracy": found})


def _key(image: str, question: str) -> str:
    return f"{image} {question.lower()}"


def _question(prompt: str) -> str:
    """The question of a prompt: its first line, or the second after the words read."""
    first, _, rest = prompt.partition("\n")
    return rest.partition("\n")[0] if first.startswith("Reference OCR token:") else first


def _words_read(folder: Any) -> dict[str, str]:
    """Image and question -> the lines of LLaVA's prompt between question and instruction."""
    file, found = find(folder, QUESTIONS), {}
    for number, row in enumerate(read_lines(file), 1):
        where = f"{file} row {number}"
        text, image = field(row, "text", str, where), field(row, "question_id", str, where)
        inside = text.split("\n")[1:-1]
        found[_key(image, _question(text))] = "".join(f"\n{line}" for line in inside)
    return found


# ---- the VQA accuracy --------------------------------------------------------------------------------

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS.split())}
ARTICLES = frozenset(("a", "an", "the"))
CONTRACTED = """
    ain't aren't isn't wasn't weren't can't couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't mightn't mightn't've mustn't needn't oughtn't shan't shouldn't shouldn't've won't
    wouldn't wouldn't've could've might've must've not've should've would've he'd he'd've he's it'd
    it'd've it'll she'd've we'd've we've they'd they'd've they'll they're they've you'd you'd've you'll
    you're you've there'd there'd've there're there's that's somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll how'd how'll
    how's what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's y'all y'all'll y'all'd've ma'am o'clock 'twas 'ow's'at
"""
# A word that lacks one of the apostrophes gets it back. The protocol's table has one entry the other way.
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in CONTRACTED.split()
    for at in (place for place, letter in enumerate(word) if letter == "'")
} | {"somebody'd": "somebodyd"}
FULL_STOPS = (
    32  # how many are deleted, at most: the published code hands re.sub a flag where a count belongs
)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The VQA accuracy (Antol et al. 2015), 0 to 1: the mean over the ten answers of min(1, m / 3), where m
    of the other nine equal the prediction. All are normalised before."""
    wanted = normalised(prediction)
    same = [normalised(each) == wanted for each in answers]
    if not any(same):
        return 0.0
    counts = Counter(min(3, sum(same) - each) for each in same)
    return sum(matches * count for matches, count in counts.items()) / (3 * len(answers))


def normalised(text: str) -> str:
    """An answer as the VQA protocol compares it (https://visualqa.org/evaluation.html), in the form that
    TextVQA's scorer has it: lower case, without articles and most punctuation, numbers up to ten as digits,
    apostrophes put back.

    A mark is deleted if it touches a blank anywhere in the text, and becomes a blank if not. The protocol
    deletes marks, too, where a comma stands between digits; commas are gone by then.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found = text
    for mark in MARKS:
        touches = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if touches else " ")
    found = re.sub(r"\.(?!\d)", "", found, count=FULL_STOPS)
    words = [DIGITS.get(word, word) for word in found.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
