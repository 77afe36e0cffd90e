"""The annotator that a config opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_align.annotate.verdict import Annotator, Question, Verdict
from mllm_align.config.annotators import AnnotatorConfig
from mllm_align.config.parts import DataConfig
from mllm_align.data.records import Record
from mllm_align.errors import InputError, NotFinite, one_line
from mllm_align.registry import part_name

if TYPE_CHECKING:
    from mllm_align.models.bundle import Bundle


@dataclass(frozen=True)
class Context:
    """What an annotator may use.

    base: the policy's, to be asked without what a run has trained; None where the annotator is another.
    folder: where answers are kept; None keeps them in memory. data: of the run; its chat template is the
    base's. progress: name of a progress bar for what is asked on the devices. records: whose responses will
    be asked about, as far as that is known.
    """

    base: Bundle | None = None
    folder: Path | None = None
    data: DataConfig = DataConfig()
    progress: str | None = None
    records: Sequence[Record] = ()


def open_annotator(config: AnnotatorConfig, context: Context | None = None) -> Annotator:
    """Raises InputError for a config that can't be followed."""
    context, name = context or Context(), part_name(type(config))
    return config.open(context) if name is None else _Own(name, config, context)


class _Own:
    """A user's annotator: what goes wrong in it is one line that names it."""

    def __init__(self, name: str, config: AnnotatorConfig, context: Context):
        self.name = name
        self._annotator = self._run(lambda: config.open(context))

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        verdicts = self._run(lambda: list(self._annotator(questions)))
        if len(verdicts) != len(questions) or not all(isinstance(each, Verdict) for each in verdicts):
            kinds = ", ".join(sorted({type(each).__name__ for each in verdicts})) or "nothing"
            problem = f"gives {len(verdicts)} items ({kinds}) for {len(questions)} questions"
            raise InputError(f"annotator {self.name} {problem}; return one Verdict for each")
        for verdict, question in zip(verdicts, questions, strict=True):
            if verdict.outcome == "ranked" and len(verdict.scores) != len(question.responses):
                problem = f"gives {len(verdict.scores)} scores for {len(question.responses)} responses"
                raise InputError(f"annotator {self.name} {problem}; give one score for each")
        return verdicts

    def _run(self, call):
        try:
            return call()
        except (InputError, NotFinite):
            raise
        except Exception as error:  # the user's program: anything may come out of it
            said = f"{type(error).__name__}: {one_line(error, 300)}"
            raise InputError(f"annotator {self.name} raises {said}; mend it") from error
