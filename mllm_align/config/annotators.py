"""Who says which of several responses is better."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from mllm_align.config.checks import DAY, MANY, STEPS, check_types, require, within
from mllm_align.config.parts import DataConfig, DistributedConfig, Dtype, MeshConfig


class AnnotatorConfig:
    """What a run must know of an annotator before it opens it.

    on_devices: it computes on the devices, so every process asks it about everything, in turn with the
        training.
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


@dataclass(frozen=True)
class JudgeModel(AnnotatorConfig):
    """A LLaVA model on the same devices, asked in both orders which response is better."""

    on_devices: ClassVar[bool] = True
    model: str | None = None
    """Hugging Face LLaVA folder; default: the one that is judged or trained (the policy's own base)."""
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


@dataclass(frozen=True)
class Endpoint(AnnotatorConfig):
    """An OpenAI-compatible chat endpoint that takes images (vLLM, SGLang, a cloud), asked in both orders.

    Answers are kept on disk beside the run and never asked for twice.
    """

    # How it is reached, not what it answers.
    may_change: ClassVar[frozenset[str]] = frozenset(
        ("url", "key_variable", "concurrency", "timeout", "retries", "budget")
    )
    url: str = "http://localhost:8000/v1"
    """Base address; /chat/completions is appended."""
    model: str = "default"
    """The model's name there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if one is needed; the key is never written anywhere."""
    concurrency: int = 8
    """Most requests on their way at once, of each process."""
    timeout: float = 60.0
    """Seconds until a request counts as failed."""
    retries: int = 5
    """How often a failed request is sent again, after growing pauses."""
    budget: int | None = None
    """Most requests of a run, of each process; retries count, answers on disk do not."""
    max_tokens: int = 256
    """Most tokens of an answer."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What a request calls that; some servers take only the newer name."""
    temperature: float | None = 0.0
    """None leaves it out, for models that refuse it."""

    def __post_init__(self):
        check_types(self, "annotator.")
        good = self.url.startswith(("http://", "https://")) and "@" not in self.url
        require(good, "annotator.url", self.url, "an http(s) address; a key belongs in the environment")
        require(self.model != "", "annotator.model", self.model, "a name")
        require(self.key_variable != "", "annotator.key_variable", self.key_variable, "a variable's name")
        within(self, "annotator.", 1, 1024, "concurrency")
        within(self, "annotator.", 1, 16 * MANY, "max_tokens")
        require(0 < self.timeout <= DAY, "annotator.timeout", self.timeout, f"above 0, and at most {DAY}")
        within(self, "annotator.", 0, 100, "retries")
        warm = self.temperature is None or 0 <= self.temperature <= 2
        require(warm, "annotator.temperature", self.temperature, "from 0 to 2, or none")
        within(self, "annotator.", 1, STEPS, "budget")


@dataclass(frozen=True)
class SceneOracle(AnnotatorConfig):
    """Scenes only: counts what each response gets wrong, exactly; fewer errors win, then higher recall."""

    scenes: Path = Path("runs/quickstart/scenes")
    """Folder of the drawn pictures (quickstart OUT/scenes)."""

    def __post_init__(self):
        if isinstance(self.scenes, str):
            object.__setattr__(self, "scenes", Path(self.scenes))
        check_types(self, "annotator.")


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


@dataclass(frozen=True)
class Scorer(AnnotatorConfig):
    """A Python function that scores responses: a reward model, a rule."""

    function: str = "package.module:function"
    """Called with a list of annotate.Question, returns a list of lists of floats, one for each response,
    the higher the better; importable from where the command runs."""

    def __post_init__(self):
        check_types(self, "annotator.")
        module, colon, name = self.function.partition(":")
        require(bool(module and colon and name), "annotator.function", self.function, "module:function")


Annotator = JudgeModel | Endpoint | SceneOracle | SceneQuestions | Scorer
ANNOTATORS = {
    "judge": JudgeModel,
    "endpoint": Endpoint,
    "oracle": SceneOracle,
    "questions": SceneQuestions,
    "scorer": Scorer,
}


@dataclass(frozen=True)
class JudgeConfig:
    """How good an annotator is: its accuracy on a file of preference pairs."""

    annotator: Annotator = JudgeModel()
    """Who is tested. On the command line `--annotator judge|endpoint|oracle|questions|scorer`."""
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    dtype: Dtype = "auto"
    """Of the policy's base, where the annotator is that. auto: float32 on CPU, bfloat16 elsewhere."""

    def __post_init__(self):
        check_types(self)
