"""Annotators for Scenes: an oracle that knows the picture, and one that questions the base model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from mllm_align.annotate.factory import Context
from mllm_align.annotate.judge import LocalModel, untrained
from mllm_align.annotate.verdict import Question, Verdict, scored
from mllm_align.config.annotators import ANNOTATORS, AnnotatorConfig
from mllm_align.config.checks import MANY, check_types, within
from mllm_align.data.records import Message, Part, Record
from mllm_align.errors import InputError, quoted, refusal
from mllm_align.testbed.hallucination import Counts, count
from mllm_align.testbed.scenes.language import QUESTIONS, Reading, parse, yes_or_no
from mllm_align.testbed.scenes.world import SPLITS, Scene

if TYPE_CHECKING:
    import grain

# A record is named after its scene; then come the question's number and a mark of hidden pictures.
NAME = re.compile(rf"(?P<scene>(?P<split>{'|'.join(SPLITS)})-(?P<index>\d+))(-\d+)?(-blind)?")
ANSWER_TOKENS = 4  # enough for yes or no with any tokenizer


@ANNOTATORS.register("oracle")
@dataclass(frozen=True)
class SceneOracle(AnnotatorConfig):
    """Scenes only: counts what each response gets wrong, exactly."""

    scenes: Path = Path("runs/quickstart/scenes")
    """Folder of the drawn pictures (quickstart OUT/scenes)."""
    order: Literal["errors", "f1"] = "errors"
    """errors: fewer wrong claims win, then higher recall, which teaches to say less. f1: what is missing
    counts as much as a wrong claim, F1 = 2 named / (2 named + wrong + missing); sentences outside the
    grammar are wrong."""

    def __post_init__(self):
        if isinstance(self.scenes, str):
            object.__setattr__(self, "scenes", Path(self.scenes))
        check_types(self, "annotator.")

    def open(self, context: Context) -> Oracle:
        return Oracle(self.scenes, context.records, self.order)


class Oracle:
    """Scores a response by what it says of the scene of its record."""

    def __init__(self, scenes: Path, records: Sequence[Record] = (), order: str = "errors"):
        """scenes: folder of the drawn pictures. records: those that are known beforehand. Raises InputError
        if one of them has no scene."""
        self.folder, self._score = scenes, SCORES[order]
        self._split = cache(self._read)
        self._scenes: dict[str, Scene] = {}
        for record in records:
            self.scene(record)

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        return [self._counted(self.scene(q.record), q.responses) for q in questions]

    def _counted(self, scene: Scene, responses: Sequence[str]) -> Verdict:
        counts = [count(scene, text) for text in responses]
        reasons = (f"Response {number}: {_reason(each)}" for number, each in enumerate(counts, 1))
        return scored([self._score(each) for each in counts], "; ".join(reasons))

    def _read(self, split: str) -> grain.MapDataset:
        from mllm_align.testbed.scenes import builder

        return builder.read(self.folder, split)

    def scene(self, record: Record) -> Scene:
        """The scene named in a record's id. Raises InputError if there is none."""
        name = NAME.fullmatch(record.id)
        if name is None:
            raise self._missing(record, "is not named after a scene")
        key = name["scene"]
        if key not in self._scenes:
            try:
                examples: grain.MapDataset = self._split(name["split"])
            except InputError as error:
                raise self._missing(record, str(error)) from error
            number = int(name["index"])
            found = examples[number] if number < len(examples) else None  # larger indices wrap around
            if found is None or found.id != key:
                raise self._missing(record, "has no scene there")
            self._scenes[key] = found.scene
        return self._scenes[key]

    def _missing(self, record: Record, problem: str) -> InputError:
        at = f"{record.where}, id {quoted(record.id)}, scenes in {quoted(self.folder)}"
        return refusal(at, problem, "give annotator.scenes the folder that the records were made from")


def fewer_errors(counts: Counts) -> float:
    """Minus the number of wrong claims; recall breaks ties, as its term is below 1."""
    return counts.recalled / (counts.present + 1) - sum(_errors(counts).values())


def f1(counts: Counts) -> float:
    """F1 of the things in the picture, with every wrong claim as a false positive.

    So is every sentence outside the grammar: a policy that is rewarded soon finds ones that name things
    and claim no place or relation. A thing that is named twice counts once: repetition wins nothing.
    """
    wrong = sum(_errors(counts).values()) + counts.unparsed
    missing = counts.present - counts.recalled
    return 2 * counts.recalled / max(2 * counts.recalled + wrong + missing, 1)


SCORES = {"errors": fewer_errors, "f1": f1}


def _errors(counts: Counts) -> dict[str, int]:
    return {
        "not there": counts.hallucinated,
        "of wrong colour or size": counts.attributes_wrong,
        "in a wrong place": counts.places_wrong,
        "in a wrong relation": counts.relations_wrong,
    }


def _reason(counts: Counts) -> str:
    wrong = [f"{number} {what}" for what, number in _errors(counts).items() if number]
    return f"{', '.join(wrong) or 'no error'}, {counts.recalled} of {counts.present} things named"


@ANNOTATORS.register("questions")
@dataclass(frozen=True)
class SceneQuestions(AnnotatorConfig):
    """Scenes only: the policy's own base is asked whether each mentioned thing is there; fewer noes win."""

    on_devices: ClassVar[bool] = True
    batch_size: int = 64
    """Questions at once, over all devices."""

    def __post_init__(self):
        check_types(self, "annotator.")
        within(self, "annotator.", 1, MANY, "batch_size")

    @property
    def asks_base(self) -> bool:
        return True

    def open(self, context: Context) -> SelfQuestions:
        return SelfQuestions(self, context)


class SelfQuestions:
    """Asks the policy's base model, without its trained parameters, whether each thing that a response
    mentions is in the picture: the model's vision is checked against its language prior."""

    def __init__(self, config: SceneQuestions, context: Context):
        answers = untrained(context.base), ANSWER_TOKENS, config.batch_size
        self._ask = LocalModel(*answers, context.data, context.progress)

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        readings = [[parse(text) for text in question.responses] for question in questions]
        kinds = [sorted({m.kind for reading in each for m in reading.mentions}) for each in readings]
        asked = [
            _presence(question.record, kind)
            for question, each in zip(questions, kinds, strict=True)
            for kind in each
        ]
        answers = iter(self._ask(asked))
        return [
            _answered(each, {kind: next(answers) for kind in own})
            for each, own in zip(readings, kinds, strict=True)
        ]


def _presence(record: Record, kind: str) -> Record:
    """The question whether a thing is in the picture, in fixed words."""
    article = "an" if kind[0] in "aeiou" else "a"
    text = QUESTIONS["presence"][0].format(a=f"{article} {kind}")
    message = Message("user", (*[Part()] * len(record.images), Part(text)))
    return Record(record.id, (message,), (), record.images, record.where)


def _answered(readings: Sequence[Reading], answers: dict[str, str | None]) -> Verdict:
    """The verdict on responses, from the answers about each kind that they mention."""
    reason = ", ".join(f"{kind}: {answer}" for kind, answer in answers.items())
    if None in answers.values():
        return Verdict("failed", reason=reason)
    present = {kind: yes_or_no(answer or "") for kind, answer in answers.items()}
    if None in present.values():
        return Verdict("unparsable", reason=reason)
    return scored([-float(_denied(reading, present)) for reading in readings], reason)


def _denied(reading: Reading, present: dict[str, bool | None]) -> int:
    """Number of mentions of absent things; an unparsed sentence that names nothing counts as one."""
    babble = sum(not parse(sentence).mentions for sentence in reading.unparsed)
    return babble + sum(not present[mention.kind] for mention in reading.mentions)
