"""A training run: one tree of frozen dataclasses, checked where it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mllm_align.align.checks import check_objective
from mllm_align.align.contract import Objective
from mllm_align.align.pairwise import DPO
from mllm_align.align.weighted import Sum
from mllm_align.config.checks import MANY, SEED, STEPS, check_types, require, within
from mllm_align.config.online import Online, Rounds
from mllm_align.config.parts import (
    DataConfig,
    DistributedConfig,
    Dtype,
    LoraConfig,
    MeshConfig,
    OptimConfig,
)

Remat = Literal["auto", "none", "dots", "gate", "qkv", "attention", "full"]
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}  # name -> package
PARTS = ("vision_tower", "projector", "image_newline", "decoder")


@dataclass(frozen=True)
class Config:
    """A training run."""

    # Fields that a run that goes on may change: nothing that moves a number.
    may_change: ClassVar[frozenset[str]] = frozenset(
        (
            *("log_every", "eval_every", "save_every", "keep", "trackers", "checkpoints"),
            # These move a number by rounding alone: another machine may need others.
            *("mesh", "distributed", "micro_batches", "remat", "nonfinite"),
            # How long a run goes on is checked by itself (run_folder.goes_on).
            *("steps", "epochs"),
        )
    )
    objective: Objective = DPO()
    """What is minimised. On the command line `--objective KIND` changes the kind; KIND may be a class in a
    file of your own, my_losses.py:Mine. `--objective dpo:0.8 sft:0.1` is a sum, its parts' settings are
    `--objective.dpo.beta`."""
    online: Online | None = None
    """Responses that the policy makes while it trains; None: all come from the data. On the command line
    `--online none|pairs|bdhs|distorted`."""
    lora: LoraConfig | None = LoraConfig()
    """Train low-rank terms and the projector; None (`--lora none`) trains the parameters themselves."""
    freeze: tuple[str, ...] = ("vision_tower",)
    """Parts that full fine-tuning leaves alone, of vision_tower, projector, image_newline, decoder."""
    reference: Literal["live", "stored"] = "live"
    """Reference log-probs: computed in every step, or once beforehand and kept beside the data."""
    features: Literal["live", "stored"] = "live"
    """Features of the frozen vision tower: computed in every step, or once beforehand and read from the run
    folder."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    batch_size: int = 32
    """Prompts per optimizer step, over all devices."""
    micro_batches: int = 1
    """Parts of a batch, run one by one to save memory; the gradient is the same."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps; overrides epochs."""
    seed: int = 0
    """Of the order in which the data comes, of how LoRA begins, and of sampling."""
    dtype: Dtype = "auto"
    """Of the computation; what is trained is float32. auto: float32 on CPU, bfloat16 elsewhere."""
    remat: Remat = "full"
    """What a block keeps for its backward pass; the rest is computed again. none: all of it; dots: matrix
    products and attention; gate: those but the feed-forward's up; qkv: queries, keys, values, attention;
    attention: its output; full: the block's input alone. auto: the first from dots on that fits in the
    devices' memory, found by compiling before the first step; on a CPU none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: stop, or leave the step out and count it. The records are
    written to log.jsonl either way, and the parameters stay as they were. So with held-out batches, and
    with groups for which the policy's logits are not finite while it responds (online)."""
    log_every: int = 10
    """Steps between lines on the terminal and in log.jsonl."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out file; default: at the end only."""
    save_every: int = 200
    """Steps between checkpoints; the last step is always saved, and the best one so far."""
    keep: int = 2
    """Last checkpoints kept; the one that evaluated best is kept besides."""
    best: str = "loss"
    """By what the best checkpoint is told: the held-out loss, or a figure of a benchmark that is asked
    while training, as pope/mean_f1."""
    checkpoints: str | None = None
    """Folder of the checkpoints, gs:// too; default: checkpoints in the run folder."""
    trackers: tuple[str, ...] = ()
    """Where figures go beside log.jsonl: some of tensorboard, wandb, mlflow, each an extra to install."""

    def __post_init__(self):
        check_types(self)
        within(self, "", 1, MANY, "batch_size", "micro_batches")
        within(self, "", 1, STEPS, "steps", "log_every", "eval_every", "save_every", "keep")
        require(0 < self.epochs <= STEPS, "epochs", self.epochs, f"above 0, and at most {STEPS}")
        within(self, "", 0, SEED, "seed")
        require(
            self.batch_size % self.micro_batches == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of micro_batches ({self.micro_batches})",
        )
        good = set(self.freeze) <= set(PARTS)
        require(good, "freeze", self.freeze, f"some of {', '.join(PARTS)}")
        require(
            self.lora is not None or set(self.freeze) != set(PARTS),
            "freeze",
            self.freeze,
            "fewer than all parts: nothing is left to train",
        )
        good = set(self.trackers) <= TRACKERS.keys()
        require(good, "trackers", self.trackers, f"some of {', '.join(TRACKERS)}")
        check_objective(self.objective)
        check_types(self.objective, "objective.")
        if isinstance(self.objective, Sum):
            for part in self.objective.parts:
                check_types(part.objective, f"objective.{part.name}.")
        if self.features == "stored":
            frozen = self.lora is not None or "vision_tower" in self.freeze
            require(frozen, "features", "stored", "live: the vision tower is trained (freeze has it not)")
            fixed = self.online is None or not self.online.distorts
            require(fixed, "features", "stored", "live: `online` puts noise on the images")
        self._check_online()

    def _check_online(self) -> None:
        kind, online = type(self.objective).__name__, self.online
        fields = self.objective.fields
        good = bool(fields) == (online is not None and online.rollout)
        wanted = "one on pairs, without --online rewards" if not fields else "another, or --online rewards"
        require(good, "objective", kind, wanted)
        good = not self.objective.borrowed or self.reference == "live"
        wanted = f"live: {kind} sees responses of other records, which differ from batch to batch"
        require(good, "reference", self.reference, wanted)
        good = "kl" not in self.objective.needs or self.reference == "live"
        wanted = f"live: {kind} compares with all of the reference's distributions"
        require(good, "reference", self.reference, wanted)
        good = "references" not in self.objective.needs or online is None
        wanted = "another, or --online none: other references see the data's responses alone"
        require(good, "objective", kind, wanted)
        if online is None:
            good = not self.objective.made
            require(good, "objective", kind, "another, or `online` must make the third response")
            return
        require(
            self.reference == "live", "reference", self.reference, "live: new responses come every step"
        )
        online.check(kind, self.objective.responses)
        if online.rollout:
            value, fits = getattr(online, "value_model", None), "values" in self.objective.needs
            require(value is None or fits, "online.value_model", value, "left out: only PPO has one")

    @staticmethod
    def of_earlier(values: dict[str, Any]) -> dict[str, Any]:
        """Plain values as earlier versions saved them, in today's fields."""
        written = values.get("tensorboard")
        if not isinstance(written, bool):
            return values
        rest = {name: value for name, value in values.items() if name != "tensorboard"}
        return rest | ({"trackers": rest.get("trackers") or ["tensorboard"]} if written else {})

    @property
    def rows_per_micro(self) -> int:
        """Prompts of one micro-batch, over all devices."""
        return self.batch_size // self.micro_batches

    @property
    def int8(self) -> bool:
        """Whether the frozen base is kept in int8."""
        return self.lora is not None and self.lora.base == "int8"

    @property
    def rounds(self) -> Rounds:
        """How updates go with batches of the data."""
        return Rounds() if self.online is None else self.online.rounds

    @property
    def live_reference(self) -> bool:
        """Whether the reference runs in every step; in rounds it runs when the responses are made."""
        made = self.online is not None and self.online.rollout
        return "reference" in self.objective.needs and self.reference == "live" and not made

    @property
    def stored_reference(self) -> bool:
        """Whether batches hold the reference's log-probs."""
        return "reference" in self.objective.needs and self.reference == "stored"

    @property
    def redraws_images(self) -> bool:
        """Whether every pass over the data draws crops and noise anew: not where what follows from them is
        stored."""
        return "stored" not in (self.reference, self.features)

    @property
    def data_responses(self) -> int:
        """How many responses a training record must have."""
        compared = self.objective.of_record
        return compared if self.online is None else self.online.data_responses(compared)
