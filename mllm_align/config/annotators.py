"""Who says which of several responses is better."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mllm_align.config.checks import check_types
from mllm_align.config.parts import DataConfig, DistributedConfig, Dtype, MeshConfig
from mllm_align.errors import InputError
from mllm_align.registry import Registry

ANNOTATORS = Registry("annotator", "mllm_align.annotate", "mllm_align.testbed.annotators")


@dataclass(frozen=True)
class AnnotatorConfig:
    """Settings of an annotator, and what a run must know of it before it opens it. Subclasses are frozen
    dataclasses; what they compute with is imported when they are opened.

    on_devices: it computes on the devices, so every process asks it about everything, in turn with the
        training; else each process asks about its own.
    may_change: fields that a run that goes on may change: they do not move an answer.
    """

    on_devices: ClassVar[bool] = False
    may_change: ClassVar[frozenset[str]] = frozenset()

    @property
    def asks_base(self) -> bool:
        """Whether the annotator is the policy's own base."""
        return False

    @property
    def model_folder(self) -> str | None:
        """Folder of a model that is not the policy's base; a run keeps its fingerprint."""
        return None

    def on_mesh(self, mesh: MeshConfig) -> AnnotatorConfig:
        """The same, for `judge`, where nothing else is on the devices: a model of its own takes this mesh
        unless it has another."""
        return self

    def open(self, context: Any) -> Any:
        """The annotator (`annotate.verdict.Annotator`). context: `annotate.factory.Context`. Raises
        InputError for settings that can't be followed; default: the object itself, if it can be called."""
        return self


def default_annotator() -> AnnotatorConfig:
    return ANNOTATORS["judge"]()


def check_annotator(config: AnnotatorConfig) -> None:
    """Raises InputError for a user's annotator that does not keep the contract."""
    kind, name = type(config), type(config).__name__
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise InputError(f"annotator {name} is no frozen dataclass; put @dataclass(frozen=True) above it")
    if kind.open is AnnotatorConfig.open and not callable(config):
        raise InputError(f"annotator {name} has neither open(context) nor __call__(questions); give it one")
    unknown = kind.may_change - {each.name for each in dataclasses.fields(kind)}
    if unknown:
        raise InputError(f"annotator {name} has may_change {sorted(unknown)}; it has no such fields")
    check_types(config, "annotator.")


@dataclass(frozen=True)
class JudgeConfig:
    """How good an annotator is: its accuracy on a file of preference pairs."""

    annotator: AnnotatorConfig = field(default_factory=default_annotator)
    """Who is tested. On the command line `--annotator KIND`; KIND may be a class in a file of your own,
    my_annotator.py:Mine."""
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    dtype: Dtype = "auto"
    """Of the policy's base, where the annotator is that. auto: float32 on CPU, bfloat16 elsewhere."""

    def __post_init__(self):
        check_types(self)
        check_annotator(self.annotator)
