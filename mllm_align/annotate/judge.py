"""A model on these devices as the judge, and how any model on them is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from mllm_align.annotate.factory import Context
from mllm_align.annotate.pairwise import Asked, Pairwise
from mllm_align.config.annotators import ANNOTATORS, AnnotatorConfig
from mllm_align.config.checks import MANY, check_types, within
from mllm_align.config.parts import DataConfig, Dtype, MeshConfig, SamplingConfig
from mllm_align.data.records import Record
from mllm_align.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from mllm_align.data.encode import Encoder
    from mllm_align.generation.decode import Generator
    from mllm_align.models.bundle import Bundle


@ANNOTATORS.register("judge")
@dataclass(frozen=True)
class JudgeModel(AnnotatorConfig):
    """A model on the same devices, asked in both orders which response is better."""

    on_devices: ClassVar[bool] = True
    model: str | None = None
    """Hugging Face model folder; default: the one that is judged or trained (the policy's own base)."""
    max_tokens: int = 96
    """Most tokens of its answer."""
    batch_size: int = 8
    """Questions at once, over all devices."""
    dtype: Dtype = "auto"
    """Of the computation. auto: float32 on CPU, bfloat16 elsewhere."""
    mesh: MeshConfig | None = None
    """Of the judge, if it is another model than the policy's base; default: that of the run."""

    def __post_init__(self):
        check_types(self, "annotator.")
        within(self, "annotator.", 1, MANY, "max_tokens", "batch_size")

    @property
    def asks_base(self) -> bool:
        return self.model is None

    @property
    def model_folder(self) -> str | None:
        return self.model

    def on_mesh(self, mesh: MeshConfig) -> JudgeModel:
        return replace(self, mesh=mesh) if self.model is not None and self.mesh is None else self

    def open(self, context: Context) -> Pairwise:
        """A model that compares: `model`, loaded before its first answer, else the base without what a run
        has trained. The run's chat template is that of the base alone."""
        if self.model is None:
            bundle, template = untrained(context.base), context.data
        else:
            bundle, template = _other(self, self.model, context.base), DataConfig()
        asker = LocalModel(bundle, self.max_tokens, self.batch_size, template, context.progress)
        return Pairwise(lambda asked: asker([_record(each) for each in asked]))


@dataclass(frozen=True)
class LocalModel:
    """Greedy answers of a model under its own tokenizer and chat template.

    bundle: gives the model; called once, before the first answer. max_tokens: limit of an answer.
    batch_size: questions at once. data: chat_template of it is used. progress: name of the progress bar.
    """

    bundle: Callable[[], Bundle]
    max_tokens: int
    batch_size: int
    data: DataConfig = DataConfig()
    progress: str | None = None

    @cached_property
    def _opened(self) -> tuple[Encoder, Generator, int]:
        from mllm_align.generation.decode import Generator
        from mllm_align.prepare import make_encoder

        bundle = self.bundle()
        generator = Generator(bundle, self._greedy, self.batch_size)
        return make_encoder(bundle, self.data), generator, bundle.config.decoder.max_length

    @property
    def _greedy(self) -> SamplingConfig:
        return SamplingConfig(temperature=0.0, max_tokens=self.max_tokens)

    def __call__(
        self, records: Sequence[Record], done: Callable[[int, str], None] | None = None
    ) -> list[str | None]:
        """An answer to each record's prompt; None where it is too long with its answer. done: called with
        the place and the answer of each record as soon as it is there. Raises NotFinite where logits are
        not finite."""
        out: list[str | None] = [None] * len(records)
        if not records:
            return out
        from mllm_align.generation.respond import respond

        encoder, decoder, limit = self._opened
        taken = [encoder.encode(record, 0, index) for index, record in enumerate(records)]
        taken = [each for each in taken if each.shape.prefix + self.max_tokens <= limit]
        if taken:

            def tell(place: int, tokens: list[np.ndarray]) -> None:
                if done is not None:
                    done(taken[place].index, encoder.text(tokens[0]).strip())

            tokens = respond(decoder, encoder, taken, self._greedy, what=self.progress, done=tell)
            for each, (ids,) in zip(taken, tokens, strict=True):
                out[each.index] = encoder.text(ids).strip()
        return out


def untrained(base: Bundle | None) -> Callable[[], Bundle]:
    """Gives the base as its checkpoint has it. Raises InputError where there is none."""
    if base is None:
        raise InputError("the annotator is the policy's own base, which is not given; name it with --model")
    bundle = replace(base, trained={}, lora=None)
    return lambda: bundle


def _other(config: JudgeModel, model: str, base: Bundle | None) -> Callable[[], Bundle]:
    from mllm_align.models.bundle import load

    mesh = config.mesh if config.mesh is not None or base is None else base.mesh
    return lambda: load(model, config.dtype, mesh)


def _record(asked: Asked) -> Record:
    """The question, under the id of the record it is about: greedy answers hang on no id."""
    record = asked.record
    return Record(record.id, asked.messages, (), record.images, record.where)
