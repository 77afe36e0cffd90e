"""A chat endpoint's settings, and those of a judge of benchmarks, which is an endpoint or a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from mllm_align.config.checks import DAY, MANY, STEPS, check_types, require, within
from mllm_align.errors import InputError


@dataclass(frozen=True)
class Server:
    """How an OpenAI-compatible chat endpoint is reached and asked. Subclasses add the model's name there.

    branch: what the options of these settings begin with, as errors name them.
    """

    branch: ClassVar[str]
    url: str | None = None
    """Base address; /chat/completions is appended."""
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
        branch, (called, name) = self.branch, self.served
        check_types(self, branch)
        url = self.url
        good = url is None or (url.startswith(("http://", "https://")) and "@" not in url)
        require(good, f"{branch}url", url, "an http(s) address; a key belongs in the environment")
        require(name != "", called, name, "a name")
        require(self.key_variable != "", f"{branch}key_variable", self.key_variable, "a variable's name")
        within(self, branch, 1, 1024, "concurrency")
        within(self, branch, 1, 16 * MANY, "max_tokens")
        require(0 < self.timeout <= DAY, f"{branch}timeout", self.timeout, f"above 0, and at most {DAY}")
        within(self, branch, 0, 100, "retries")
        warm = self.temperature is None or 0 <= self.temperature <= 2
        require(warm, f"{branch}temperature", self.temperature, "from 0 to 2, or none")
        within(self, branch, 1, STEPS, "budget")

    @property
    def served(self) -> tuple[str, str]:
        """The setting that has the model's name at the endpoint, and that name."""
        raise NotImplementedError


@dataclass(frozen=True)
class EndpointOrModel(Server):
    """Who is asked: an OpenAI-compatible chat endpoint (url, name), or a model on these devices. Without
    either, nobody. Subclasses say by `role` what it is asked for.
    """

    role: ClassVar[str]
    name: str = "default"
    """The model's name at the endpoint."""
    model: str | None = None
    """Hugging Face model folder, asked on these devices in place of an endpoint; its answers are greedy."""
    batch_size: int = 8
    """Questions at once, of a model, over all devices."""

    def __post_init__(self):
        super().__post_init__()
        within(self, self.branch, 1, MANY, "batch_size")
        url, model = f"{self.branch}url", f"{self.branch}model"
        if self.url is not None and self.model is not None:
            raise InputError(f"{url} and {model} name two {self.role}s; leave one out")
        each = dataclasses.fields(self)
        idle = [field.name for field in each if getattr(self, field.name) != field.default]
        if idle and not self.given:
            remedy = f"name it with {url} or {model}"
            raise InputError(f"{self.branch}{idle[0]} is given, but no {self.role}; {remedy}")

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self.url is not None or self.model is not None

    @property
    def served(self) -> tuple[str, str]:
        return f"{self.branch}name", self.name

    @property
    def shown(self) -> str:
        """The setting that names it, for errors."""
        if self.model is not None:
            return f"{self.branch}model {self.model}"
        return f"{self.branch}name {self.name}"


@dataclass(frozen=True)
class BenchmarkJudge(EndpointOrModel):
    """Who rates a model's answers, for benchmarks that a judge scores. Without one, nobody is asked."""

    branch: ClassVar[str] = "judge."
    role: ClassVar[str] = "judge"
    runs: int = 1
    """How often an endpoint is asked about every answer; figures are means over the runs."""
    budget: int | None = None
    """Most requests of all runs; retries count, and every verdict on disk counts as one."""
    max_tokens: int = 1024
    """Most tokens of a verdict."""

    def __post_init__(self):
        super().__post_init__()
        within(self, self.branch, 1, 1000, "runs")
        if self.model is not None and self.runs > 1:
            raise InputError("judge.runs asks an endpoint: greedy verdicts of a model are all the same")


@dataclass(frozen=True)
class Writer(EndpointOrModel):
    """Who writes responses from chosen ones; a text model is enough: it is shown no image."""

    branch: ClassVar[str] = "writer."
    role: ClassVar[str] = "writer"
    max_tokens: int = 512
    """Most tokens of a response."""
