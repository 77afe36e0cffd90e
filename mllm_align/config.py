"""Every setting of a run: one tree of frozen dataclasses, checked where it is built.

A config file is Python with `get_config() -> Config`; presets are made with `dataclasses.replace`. The
command line may override any field (`--optim.learning-rate 1e-6`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mllm_align.align.objectives import DPO, IPO, SFT, Objective, RobustDPO, SLiC
from mllm_align.errors import InputError, one_line

Dtype = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]
PARTS = ("vision_tower", "projector", "image_newline", "decoder")
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
OBJECTIVES = {"dpo": DPO, "robust": RobustDPO, "ipo": IPO, "slic": SLiC, "sft": SFT}


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{name} is {value!r}; it must be {wanted}")


def _check_types(config: Any, prefix: str = "") -> None:
    """Python takes any value for a field; a config file's mistake shall show here, not steps later."""
    hints = get_type_hints(type(config))
    for each in dataclasses.fields(config):
        kind = hints[each.name]
        choices = get_origin(kind) is Literal
        wanted = f"one of {', '.join(get_args(kind))}" if choices else f"of type {each.type}"
        value = getattr(config, each.name)
        _require(_fits(value, kind), prefix + each.name, value, wanted)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(frozen=True)
class DataConfig:
    """How records become batches."""

    format: Literal["auto", "trl", "povid", "rlhfv"] = "auto"
    """Layout of the data file's rows; auto tells by their fields."""
    image_root: Path | None = None
    """Folder that image paths start from; default: the data file's."""
    allow_outside: bool = False
    """Accept image paths that lead out of that folder."""
    chat_template: Path | None = None
    """A Jinja chat template in place of the checkpoint's own."""
    max_length: int | None = None
    """Most tokens of a prompt with its longest response, image tokens included; default: the
    checkpoint's own limit. Nothing is ever cut to fit."""
    over_long: Literal["refuse", "skip"] = "refuse"
    """What to do with a longer record: stop, or leave it out and count it."""
    shuffle: bool = True
    """Draw a new order every epoch, from the seed; else file order."""
    shapes: int = 4
    """Batch shapes to compile, at most; more shapes mean less padding."""
    multiple: int = 32
    """Padded lengths are multiples of this many tokens."""
    threads: int = 4
    """Threads that read, resize and tokenize ahead of the training loop."""
    prefetch: int = 4
    """Batches held ready."""

    def __post_init__(self):
        for name in ("image_root", "chat_template"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        _check_types(self, "data.")
        for name in ("shapes", "multiple", "threads", "prefetch"):
            _require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "1 or more")
        if self.max_length is not None:
            _require(self.max_length >= 2, "data.max_length", self.max_length, "2 or more")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation of the decoder; the rest of the base stays frozen, but for the projector."""

    rank: int = 128
    """Columns of each low-rank term."""
    alpha: float = 256.0
    """The low-rank term is multiplied by alpha / rank."""
    targets: tuple[str, ...] = LORA_TARGETS
    """Which linear maps of every decoder block."""

    def __post_init__(self):
        _check_types(self, "lora.")
        _require(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        _require(0 < self.alpha < float("inf"), "lora.alpha", self.alpha, "above 0")
        good = bool(self.targets) and len(set(self.targets)) == len(self.targets)
        good = good and set(self.targets) <= set(LORA_TARGETS)
        _require(good, "lora.targets", self.targets, f"some of {', '.join(LORA_TARGETS)}")

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
        _check_types(self, "optim.")
        for name in ("learning_rate", "projector_learning_rate", "weight_decay", "eps"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < float("inf"), f"optim.{name}", value, "0 or more")
        _require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "at least 0 and below 1")
        _require(self.clip > 0, "optim.clip", self.clip, "above 0")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.{name}", value, "at least 0 and below 1")


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
        _check_types(self, "mesh.")
        _require(self.slices is None or self.slices >= 1, "mesh.slices", self.slices, "1 or more")
        sizes = (self.data, self.fsdp, self.tensor)
        good = all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1
        _require(good, "mesh (data, fsdp, tensor)", sizes, "1 or more each, with one -1 at most")


@dataclass(frozen=True)
class DistributedConfig:
    """How long the processes of a job wait for each other."""

    heartbeat_seconds: int = 30
    """A process that is silent for so long is dead; the others end, naming it."""
    shutdown_seconds: int = 60
    """How long processes that are done wait for the others."""

    def __post_init__(self):
        _check_types(self, "distributed.")
        for name in ("heartbeat_seconds", "shutdown_seconds"):
            _require(getattr(self, name) >= 5, f"distributed.{name}", getattr(self, name), "5 or more")


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
        _check_types(self, "sampling.")
        _require(
            0 <= self.temperature < float("inf"), "sampling.temperature", self.temperature, "0 or more"
        )
        _require(self.top_k is None or self.top_k >= 1, "sampling.top_k", self.top_k, "1 or more")
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0 and at most 1")
        _require(self.max_tokens >= 1, "sampling.max_tokens", self.max_tokens, "1 or more")


@dataclass(frozen=True)
class BDHSConfig:
    """Rejected responses made by the policy (bias-driven hallucination sampling, arXiv 2407.02477)."""

    distortion: Literal["attention", "noise"] = "attention"
    """What keeps the policy from looking: image embeddings that nothing attends to, or a noisy image."""
    mask_rate: float = 0.99
    """Chance of an image embedding to be masked (rho_th); 1 hides the whole image, 0 nothing."""
    noise_steps: int = 500
    """Diffusion steps of noise on the preprocessed image, of 1000."""
    guided: bool = True
    """Complete the chosen response's sentences, each from a random cut; else whole free responses."""
    iterations: int = 5
    """Most tries for a response that differs enough; the last, if there are several, is unguided."""
    similarity: str = "sentence-transformers/all-mpnet-base-v2"
    """Sentence encoder, a hub name or a local folder; or "lexical", which needs neither."""
    threshold: float | None = None
    """Similarity below which a response differs enough; default: what belongs to the encoder."""
    sentence_tokens: int = 64
    """Most tokens that complete a sentence."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    batch_size: int = 8
    """Records at once, over all devices."""
    seed: int = 0
    """Of masks, noise, cuts, swaps and tokens."""
    dtype: Dtype = "auto"
    """Of the computation. auto: float32 on CPU, bfloat16 elsewhere."""

    def __post_init__(self):
        _check_types(self)
        _require(0 <= self.mask_rate <= 1, "mask_rate", self.mask_rate, "from 0 to 1")
        _require(1 <= self.noise_steps <= 1000, "noise_steps", self.noise_steps, "from 1 to 1000")
        for name in ("iterations", "sentence_tokens", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.similarity != "", "similarity", self.similarity, "a name or a folder")
        good = self.threshold is None or abs(self.threshold) < float("inf")
        _require(good, "threshold", self.threshold, "a finite number, or None")


@dataclass(frozen=True)
class Config:
    """A training run."""

    objective: Objective = DPO()
    """What is minimised. On the command line `--objective dpo|robust|ipo|slic|sft` changes the kind."""
    lora: LoraConfig | None = LoraConfig()
    """Train low-rank terms and the projector; None (`--lora none`) trains the parameters themselves."""
    freeze: tuple[str, ...] = ("vision_tower",)
    """Parts that full fine-tuning leaves alone, of vision_tower, projector, image_newline, decoder."""
    reference: Literal["live", "stored"] = "live"
    """Reference log-probs: computed in every step, or once beforehand and kept beside the data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    batch_size: int = 32
    """Prompts per optimizer step, over all devices."""
    micro_batches: int = 1
    """Parts a batch is run in, one after another, to save memory; the gradient is the same."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps; overrides epochs."""
    seed: int = 0
    """Of the order of the data and the start of the low-rank terms."""
    dtype: Dtype = "auto"
    """Of the computation; what is trained is float32. auto: float32 on CPU, bfloat16 elsewhere."""
    remat: Remat = "full"
    """What a block keeps for its backward pass: none = all of it, dots = matrix products, full = input."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop, or leave the step out and count it. The records are
    written to log.jsonl either way, and the parameters stay as they were."""
    log_every: int = 10
    """Steps between lines on the terminal and in log.jsonl."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out file; default: at the end only."""
    save_every: int = 200
    """Steps between checkpoints; the last step is always saved, and one that evaluates best so far."""
    keep: int = 2
    """Last checkpoints kept; the one that evaluated best is kept besides."""
    checkpoints: str | None = None
    """Folder of the checkpoints, gs:// too; default: checkpoints in the run folder."""
    tensorboard: bool = False
    """Write event files too (extra `tensorboard`)."""

    def __post_init__(self):
        _check_types(self)
        counts = ("batch_size", "micro_batches", "log_every", "save_every", "keep")
        for name in counts:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("steps", "eval_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more")
        _require(0 < self.epochs < float("inf"), "epochs", self.epochs, "above 0")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(
            self.batch_size % self.micro_batches == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of micro_batches ({self.micro_batches})",
        )
        good = set(self.freeze) <= set(PARTS)
        _require(good, "freeze", self.freeze, f"some of {', '.join(PARTS)}")
        _require(
            self.lora is not None or set(self.freeze) != set(PARTS),
            "freeze",
            self.freeze,
            "fewer than all parts: nothing is left to train",
        )


# ---- files -----------------------------------------------------------------------------------------


C = TypeVar("C")


def load_config(path: str | Path, kind: type[C] | tuple[type[C], ...] = Config) -> C:
    """Run a config file; its `get_config()`, of a `kind`. Raises InputError for an unusable file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config file {path} is not there")
    spec = importlib.util.spec_from_file_location("mllm_align_user_config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config file {path} is not Python; it must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is the user's program: anything may come out of it
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"config file {path} fails: {said}") from error
    if not isinstance(config, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = f"get_config() gives {type(config).__name__}, not a {wanted}"
        raise InputError(f"{path}: {found}; train takes a Config, bdhs a BDHSConfig")
    return config


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; a union field carries its kind."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            kinds = {cls: kind for kind, cls in OBJECTIVES.items()}
            kind = kinds.get(type(value))  # type: ignore[arg-type]
            return fields if kind is None else {"kind": kind, **fields}
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def from_json(values: dict[str, Any]) -> Config:
    """The inverse of `to_json`, for configs saved with a run."""

    def path(value: str | None) -> Path | None:
        return None if value is None else Path(value)

    def tupled(values: dict[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    try:
        values = tupled(values)
        objective, lora, data = dict(values["objective"]), values["lora"], dict(values["data"])
        data.update(image_root=path(data["image_root"]), chat_template=path(data["chat_template"]))
        values.update(
            objective=OBJECTIVES[objective.pop("kind")](**objective),
            lora=None if lora is None else LoraConfig(**tupled(lora)),
            optim=OptimConfig(**values["optim"]),
            data=DataConfig(**data),
            mesh=MeshConfig(**values["mesh"]),
            distributed=DistributedConfig(**values["distributed"]),
        )
        return Config(**values)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the saved config is not of this version: {one_line(error)}") from error


def save_json(config: Any) -> str:
    return json.dumps(to_json(config), indent=2) + "\n"


assert set(get_args(Objective)) == set(OBJECTIVES.values())
