"""A reward model on these devices as the annotator: it scores each response by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mllm_align.annotate.factory import Context
from mllm_align.annotate.verdict import Question, Verdict, scored
from mllm_align.batch import Shape
from mllm_align.config.annotators import ANNOTATORS, AnnotatorConfig
from mllm_align.config.checks import MANY, check_types, within
from mllm_align.config.parts import DataConfig, Dtype, MeshConfig
from mllm_align.data.encode import Encoded, Identical
from mllm_align.errors import InputError, not_finite
from mllm_align.sizes import bucket

if TYPE_CHECKING:
    from mllm_align.models.bundle import Bundle


@ANNOTATORS.register("reward")
@dataclass(frozen=True)
class RewardModel(AnnotatorConfig):
    """A reward model on the same devices: a run with objective `reward`, or what was exported of one."""

    on_devices: ClassVar[bool] = True
    model: str | None = None
    """Its run folder, or an exported one; needed. Of a run that began from the policy's base, only what it
    trained is loaded: the base is shared."""
    batch_size: int = 8
    """Prompts at once, over all devices."""
    dtype: Dtype = "auto"
    """Of the computation. auto: the policy's where the base is shared, else float32 on CPU and bfloat16
    elsewhere. With another one the base is not shared."""
    mesh: MeshConfig | None = None
    """Of the reward model, which then shares no base; default: that of the run."""

    def __post_init__(self):
        check_types(self, "annotator.")
        within(self, "annotator.", 1, MANY, "batch_size")

    @property
    def model_folder(self) -> str | None:
        return self.model

    def on_mesh(self, mesh: MeshConfig) -> RewardModel:
        return replace(self, mesh=mesh) if self.mesh is None else self

    def open(self, context: Context) -> Rewards:
        """The model is loaded at once: one that is no reward model is refused before anything is written.
        The run's chat template is that of its base alone."""
        from mllm_align.models.bundle import load

        if not self.model:
            raise InputError("annotator reward needs annotator.model, the folder of a reward model's run")
        base = context.base
        mesh = self.mesh if self.mesh is not None or base is None else base.mesh
        alike = base if self.mesh is None and self.dtype == "auto" else None
        bundle = load(self.model, self.dtype, mesh, alike)
        shared = base is not None and bundle.params is base.params
        template = context.data if shared else DataConfig()
        return Rewards(bundle, self.batch_size, template, context.progress)


class Rewards:
    """Ranks responses by a reward model's scores; equal scores are a tie.

    batch_size: prompts at once. data: chat_template of it is used. progress: name of the progress bar.
    Responses are read as texts, so each is scored with an end of sequence, also one that was cut off.
    """

    def __init__(self, bundle: Bundle, batch_size: int, data: DataConfig, progress: str | None = None):
        from mllm_align.prepare import make_encoder
        from mllm_align.scoring import check_reward_model

        check_reward_model(bundle)
        self.bundle, self.batch_size, self.progress = bundle, batch_size, progress
        self._encoder = make_encoder(bundle, data)
        self._limit = bundle.config.decoder.max_length

    def __call__(self, questions: Sequence[Question]) -> list[Verdict]:
        """`failed` is what is too long with a response, `identical` what has two responses of the same
        tokens. Raises NotFinite where rewards are not finite."""
        out: list[Verdict | None] = [None] * len(questions)
        texts = [list(dict.fromkeys(text.strip() for text in each.responses)) for each in questions]
        alike: dict[int, list[Encoded]] = defaultdict(list)  # number of texts -> questions with as many
        for index, (question, own) in enumerate(zip(questions, texts, strict=True)):
            try:
                asked = replace(question.record, responses=tuple(own))
                encoded = self._encoder.encode(asked, len(own), index)
            except Identical as error:
                out[index] = Verdict("identical", reason=str(error))
                continue
            shape = encoded.shape
            if shape.prefix + shape.response > self._limit:
                out[index] = Verdict("failed", reason=f"it is longer than {self._limit} tokens")
                continue
            alike[len(own)].append(replace(encoded, shape=_one_of_few(shape)))
        for records in alike.values():
            for record, row in zip(records, self._rewards(records), strict=True):
                found = dict(zip(texts[record.index], row, strict=True))
                every = [found[text.strip()] for text in questions[record.index].responses]
                out[record.index] = scored(every, ", ".join(f"{value:g}" for value in every))
        return [verdict for verdict in out if verdict is not None]

    def _rewards(self, records: list[Encoded]) -> list[list[float]]:
        from mllm_align.scoring import not_finite_among, response_rewards

        exact = DataConfig(shapes=2, multiple=1)  # their shapes are rounded already
        size = min(self.batch_size, bucket(len(records), 1))
        found = response_rewards(self.bundle, self._encoder, records, exact, size, what=self.progress)
        if broken := not_finite_among(records, found):
            raise not_finite("rewards are", broken, len(records))
        return [row.tolist() for row in found]


def _one_of_few(shape: Shape) -> Shape:
    """Responses of every step have other lengths, and a run shall compile few programs."""
    return Shape(bucket(shape.prefix, 32), bucket(shape.response), bucket(shape.tiles, 1))
