"""Settings that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mllm_align.config.checks import DAY, MANY, SEED, STEPS, check_types, require, within
from mllm_align.registry import Registry, absolute, function_name

Dtype = Literal["auto", "float32", "bfloat16"]
READERS = Registry("reader", "mllm_align.data.formats")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class DataConfig:
    """How records become batches."""

    may_change: ClassVar[frozenset[str]] = frozenset(("threads", "prefetch"))
    format: str = "auto"
    """Layout of the data's rows: auto tells by the fields of the first; the name of a published set
    (docs/data.md); or a function in a file of your own, my_reader.py:read (from Python, the function)."""
    split: str | None = None
    """Which split of the data to read; needed where there are several."""
    eval_split: str | None = None
    """The same of held-out data."""
    max_records: int | None = None
    """Read this many records, the first; those that a published set's rules leave out do not count."""
    pairs: Literal["best-worst", "all"] = "best-worst"
    """Of several rated responses: the best against the worst, or each against all that are worse."""
    image_root: tuple[Path, ...] = ()
    """Folders that image paths start from, the first that has the file; default: the data file's own."""
    allow_outside: bool = False
    """Accept image paths that lead out of those folders."""
    chat_template: Path | None = None
    """A Jinja chat template in place of the checkpoint's own."""
    max_length: int | None = None
    """Most tokens of a prompt with its longest response, image tokens included; default: the
    checkpoint's own limit. Nothing is ever cut to fit."""
    over_long: Literal["refuse", "skip"] = "refuse"
    """What to do with a longer record: stop, or leave it out and count it."""
    identical: Literal["refuse", "skip"] = "refuse"
    """What to do with a record whose responses are the same text, or the same tokens: likewise."""
    shuffle: bool = True
    """Draw a new order every epoch, from the seed; else file order."""
    shapes: int = 8
    """Batch shapes to compile, at most; more shapes mean less padding. One for every 2 batches of an
    epoch. With 1, records share batches whatever their lengths."""
    multiple: int = 32
    """Padded lengths are multiples of this many tokens."""
    threads: int = 4
    """Threads that read, resize and tokenize ahead of the training loop."""
    prefetch: int = 4
    """Batches held ready."""

    def __post_init__(self):
        if isinstance(self.chat_template, str):
            object.__setattr__(self, "chat_template", Path(self.chat_template))
        roots = () if self.image_root is None else self.image_root
        roots = [roots] if isinstance(roots, str | Path) else roots
        if isinstance(roots, list | tuple):
            roots = tuple(Path(root) if isinstance(root, str) else root for root in roots)
        object.__setattr__(self, "image_root", roots)
        if callable(self.format):
            object.__setattr__(self, "format", function_name(self.format, "reader"))
        check_types(self, "data.")
        object.__setattr__(self, "format", absolute(self.format))
        known = self.format == "auto" or ":" in self.format or self.format in READERS
        names = ", ".join(READERS) if not known else ""
        require(known, "data.format", self.format, f"one of auto, {names}, or your own as file.py:read")
        within(self, "data.", 1, 1024, "shapes", "threads", "prefetch")
        within(self, "data.", 1, 8192, "multiple")
        within(self, "data.", 2, 16 * MANY, "max_length")
        within(self, "data.", 1, STEPS, "max_records")

    @property
    def own_functions(self) -> dict[str, str]:
        """The user's functions among the settings."""
        return {"reader": self.format} if ":" in self.format else {}

    def reading(self) -> dict[str, Any]:
        """What `records_from` needs to know."""
        names = ("format", "split", "max_records", "pairs", "image_root", "allow_outside")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of the decoder; the rest of the base stays frozen, but for the projector."""

    rank: int = 128
    """Columns of each low-rank term."""
    alpha: float = 256.0
    """The low-rank term is multiplied by alpha / rank."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Which linear maps of every decoder block."""
    base: Literal["full", "int8"] = "full"
    """What the frozen matrices of blocks are kept in: full = the dtype of the computation, int8 = half of
    bfloat16's memory, with a scale for each output channel."""

    def __post_init__(self):
        check_types(self, "lora.")
        within(self, "lora.", 1, MANY, "rank")
        require(0 < self.alpha <= 1e6, "lora.alpha", self.alpha, "above 0, and at most 1e6")
        good = bool(self.targets) and len(set(self.targets)) == len(self.targets)
        good = good and set(self.targets) <= set(LORA_TARGETS)
        require(good, "lora.targets", self.targets, f"some of {', '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on what is trained, in float32."""

    learning_rate: float = 1e-6
    """Peak rate per optimizer step."""
    projector_learning_rate: float | None = None
    """Peak rate of the projector; default: the same. 0 keeps it frozen."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """After warm-up: stay, or fall to 0 at the last step."""
    warmup: float = 0.03
    """Share of the steps over which the rate rises from 0."""
    weight_decay: float = 0.0
    """Share of each parameter taken off at a step, times the rate."""
    b1: float = 0.9
    """Decay of Adam's mean of gradients."""
    b2: float = 0.999
    """Decay of Adam's mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    clip: float = 1.0
    """Largest global norm of the gradient; longer ones are scaled to it."""

    def __post_init__(self):
        check_types(self, "optim.")
        within(self, "optim.", 0, 1000, "learning_rate", "projector_learning_rate", "weight_decay", "eps")
        require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "at least 0 and below 1")
        require(0 < self.clip <= 1e9, "optim.clip", self.clip, "above 0, and at most 1e9")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "at least 0 and below 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices of one slice along each axis; -1 (one axis at most) takes all that are left."""

    data: int = -1
    """Copies that each take a share of the batch."""
    fsdp: int = 1
    """Parameters are cut into this many shares; the batch is cut along it too."""
    tensor: int = 1
    """Heads, feed-forward and vocabulary are cut into this many shares."""
    slices: int | None = None
    """Slices of a multi-slice pod, each with its share of the batch; default: as the devices tell."""

    def __post_init__(self):
        check_types(self, "mesh.")
        within(self, "mesh.", 1, 16 * MANY, "slices")
        sizes = (self.data, self.fsdp, self.tensor)
        good = all(s == -1 or 1 <= s <= 16 * MANY for s in sizes) and sizes.count(-1) <= 1
        require(good, "mesh (data, fsdp, tensor)", sizes, "1 or more each, with one -1 at most")


@dataclass(frozen=True)
class DistributedConfig:
    """How long the processes of a job wait for each other."""

    heartbeat_seconds: int = 30
    """A process that is silent for so long is dead; the others end, naming it."""
    shutdown_seconds: int = 60
    """How long processes that are done wait for the others."""

    def __post_init__(self):
        check_types(self, "distributed.")
        within(self, "distributed.", 5, DAY, "heartbeat_seconds", "shutdown_seconds")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; filters apply in the order of the fields, as in transformers."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Choose among this many likeliest tokens only."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that hold this much of the probability."""
    max_tokens: int = 512
    """Most tokens of a response."""

    def __post_init__(self):
        check_types(self, "sampling.")
        within(self, "sampling.", 0, 1000, "temperature")
        within(self, "sampling.", 1, 2**31 - 1, "top_k")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0 and at most 1")
        within(self, "sampling.", 1, MANY, "max_tokens")


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job over a file of records has, beside what it does to them. Its fields are given by name,
    so that those of a job come first: EvaluationConfig(evaluator)."""

    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    batch_size: int = 8
    """Records at once, over all devices."""
    seed: int = 0
    """Of all that is drawn: tokens, and what the job draws besides."""
    dtype: Dtype = "auto"
    """Of the computation. auto: float32 on CPU, bfloat16 elsewhere."""

    def __post_init__(self):
        check_types(self)
        within(self, "", 1, MANY, "batch_size")
        within(self, "", 0, SEED, "seed")
