"""A LLaVA model on these devices as the judge, and how any model on them is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mllm_align.annotate.pairwise import Asked, Pairwise
from mllm_align.config import DataConfig, JudgeModel, SamplingConfig
from mllm_align.data.encode import Encoder
from mllm_align.data.records import Record
from mllm_align.errors import InputError
from mllm_align.generate.decode import Generator
from mllm_align.generate.respond import respond
from mllm_align.models.bundle import Bundle, load
from mllm_align.prepare import make_encoder


@dataclass(frozen=True)
class Asker:
    """Greedy answers of a model under its own tokenizer and chat template.

    bundle: gives the model; called once, before the first answer. max_tokens: most of an answer.
    batch_size: questions at once. data: chat_template of it is used. what: name of the progress bar.
    """

    bundle: Callable[[], Bundle]
    max_tokens: int
    batch_size: int
    data: DataConfig = DataConfig()
    what: str | None = None

    @cached_property
    def _opened(self) -> tuple[Encoder, Generator, int]:
        bundle = self.bundle()
        generator = Generator(bundle, self._greedy, self.batch_size)
        return make_encoder(bundle, self.data), generator, bundle.config.decoder.max_length

    @property
    def _greedy(self) -> SamplingConfig:
        return SamplingConfig(temperature=0.0, max_tokens=self.max_tokens)

    def __call__(self, records: Sequence[Record]) -> list[str | None]:
        """An answer to each record's prompt; None where it is too long with its answer. Raises NotFinite
        where logits are not finite."""
        out: list[str | None] = [None] * len(records)
        if not records:
            return out
        encoder, generator, limit = self._opened
        taken = [encoder.encode(record, 0, index) for index, record in enumerate(records)]
        taken = [each for each in taken if each.shape.prefix + self.max_tokens <= limit]
        if taken:
            tokens = respond(generator, encoder, taken, self._greedy, what=self.what)
            for each, (ids,) in zip(taken, tokens, strict=True):
                out[each.index] = encoder.text(ids).strip()
        return out


def judge(
    config: JudgeModel, base: Bundle | None, data: DataConfig | None = None, what: str | None = None
) -> Pairwise:
    """A model that compares: config.model, loaded before its first answer, else `base` without what a run
    has trained.

    data: of the run; its chat template is that of the base alone. what: name of the progress bar.
    """
    if config.model is None:
        bundle, template = untrained(base), data or DataConfig()
    else:
        bundle, template = _other(config, config.model, base), DataConfig()
    asker = Asker(bundle, config.max_tokens, config.batch_size, template, what)

    def ask(asked: Sequence[Asked]) -> list[str | None]:
        return asker([_record(each) for each in asked])

    return Pairwise(ask, everywhere=True)


def untrained(base: Bundle | None) -> Callable[[], Bundle]:
    """Gives the base as its checkpoint has it. Raises InputError where there is none."""
    if base is None:
        raise InputError("the annotator is the policy's own base, which is not given; name it with --model")
    bundle = replace(base, trained={}, lora=None)
    return lambda: bundle


def _other(config: JudgeModel, model: str, base: Bundle | None) -> Callable[[], Bundle]:
    mesh = config.mesh if config.mesh is not None or base is None else base.mesh
    return lambda: load(model, config.dtype, mesh)


def _record(asked: Asked) -> Record:
    """The question, under the id of the record it is about: greedy answers hang on no id."""
    record = asked.record
    return Record(record.id, asked.messages, (), record.images, record.where)
