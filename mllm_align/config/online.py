"""Responses that the policy makes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from mllm_align.config.annotators import AnnotatorConfig, check_annotator, default_annotator
from mllm_align.config.bdhs import BDHSMethod
from mllm_align.config.checks import check_types, require, within
from mllm_align.config.parts import MeshConfig, SamplingConfig

LARGE = 1e6


@dataclass(frozen=True)
class Rounds:
    """How updates go with batches of the data: the policy responds to `minibatches` batches, then an update
    is taken on each, `epochs` times over. Updates, batches and rounds count from 0."""

    minibatches: int = 1
    epochs: int = 1

    @property
    def updates(self) -> int:
        """Of a round."""
        return self.minibatches * self.epochs

    def first(self, update: int) -> int:
        """The first batch of the round that an update belongs to."""
        return update // self.updates * self.minibatches

    def begun(self, updates: int) -> int:
        """Batches that have been responded to when so many updates are taken."""
        return -(-updates // self.updates) * self.minibatches

    def lasting(self, batches: int) -> int:
        """Updates of whole rounds that use so many batches; what the last round lacks, it takes from the
        next pass over the data."""
        return -(-batches // self.minibatches) * self.updates

    def which(self, update: int, seed: int) -> int:
        """The batch, of those of its round, that an update is taken on: every epoch in an order of its own,
        the first in that of the data."""
        epoch, place = divmod(update % self.updates, self.minibatches)
        if not epoch:
            return place
        rng = np.random.default_rng((seed, update // self.updates, epoch))
        return int(rng.permutation(self.minibatches)[place])


class OnlineConfig:
    """What a run must know of a maker of responses before it opens it.

    maker: the class that makes the responses, as `registry.load_part` takes it.
    rollout: its batches hold what policy gradients need.
    compared: numbers of responses that an objective on its batches may compare.
    generates: responses are generated from the generation prompt, which must then tokenize as the prompt
        of a training record does; if not, tokens are drawn along a response of the data.
    distorts: the batch's images are distorted before the vision tower sees them.
    may_change: fields that a run that goes on may change.
    """

    maker: ClassVar[str]
    rollout: ClassVar[bool] = False
    compared: ClassVar[tuple[int, ...]] = (2, 3)
    generates: ClassVar[bool] = True
    distorts: ClassVar[bool] = False
    may_change: ClassVar[frozenset[str]] = frozenset({"mesh"})

    @property
    def rounds(self) -> Rounds:
        return Rounds()

    @property
    def reserved_tokens(self) -> int:
        """Tokens that every prompt must leave for a response."""
        return 0

    @property
    def limits(self) -> dict[str, tuple[str, float]]:
        """Figure of the log -> the setting that a run stops above, and its value."""
        return {}

    def data_responses(self, compared: int) -> int:
        """Responses that a record must have, for an objective that compares so many."""
        return compared - 1

    def check(self, objective: str, compared: int) -> None:
        """Refuse an objective, by its name and number of responses, and settings that clash."""
        also = ", or averaged" if 3 in self.compared else ""
        require(compared in self.compared, "objective", objective, "one on pairs" + also)


@dataclass(frozen=True)
class Sampled(OnlineConfig):
    """What makers of samples with an annotator have in common."""

    annotator: AnnotatorConfig = field(default_factory=default_annotator)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=256))
    mesh: MeshConfig | None = None
    """How the devices are cut while the policy samples; default: as in training. Where training cuts along
    fsdp, tensor is many times faster here, for a second copy of the base (docs/online.md)."""

    def __post_init__(self):
        check_types(self, "online.")
        check_annotator(self.annotator)
        hot = self.sampling.temperature > 0
        require(hot, "online.sampling.temperature", self.sampling.temperature, "above 0: samples differ")

    @property
    def reserved_tokens(self) -> int:
        return self.sampling.max_tokens


@dataclass(frozen=True)
class OnlinePairs(Sampled):
    """Responses sampled from the policy, the best and the worst by an annotator (online-DPO); with
    offline_share, examples that keep the pair of the data (mixed-DPO; arXiv 2407.02477, Eq. 4)."""

    maker: ClassVar[str] = "mllm_align.training.online.rollouts:BestAgainstWorst"
    compared: ClassVar[tuple[int, ...]] = (2,)
    annotator: AnnotatorConfig = field(default_factory=default_annotator)
    """Who ranks; `--online.annotator KIND` on the command line. KIND may be a class in a file of your own,
    my_annotator.py:Mine."""
    samples: int = 2
    """Responses sampled for each prompt."""
    offline_share: float = 0.0
    """Chance of an example to keep the pair that the data have (p); above 0 the data need pairs."""
    stale: bool = False
    """Let annotation of the next batch run while the device trains: its responses are then those of the
    policy one step earlier."""

    def __post_init__(self):
        super().__post_init__()
        within(self, "online.", 2, 1024, "samples")
        share = self.offline_share
        require(0 <= share < 1, "online.offline_share", share, "at least 0 and below 1")

    def data_responses(self, compared: int) -> int:
        return compared if self.offline_share else 0

    def check(self, objective: str, compared: int) -> None:
        super().check(objective, compared)
        wanted = "false: this annotator runs on the devices, in turn with the training"
        require(not (self.stale and self.annotator.on_devices), "online.stale", self.stale, wanted)


@dataclass(frozen=True)
class OnlineBDHS(BDHSMethod, OnlineConfig):
    """A rejected response by BDHS with the current policy, in every step; no annotator."""

    maker: ClassVar[str] = "mllm_align.training.online.rejected:RejectedByBDHS"
    annotator: ClassVar[None] = None
    samples: ClassVar[int] = 1
    mesh: MeshConfig | None = None
    """How the devices are cut while the policy samples; default: as in training (docs/online.md)."""


@dataclass(frozen=True)
class Distorted(OnlineConfig):
    """A rejected response drawn token by token along the chosen one, under a noisy image (POVID-style)."""

    maker: ClassVar[str] = "mllm_align.training.online.rejected:RejectedByNoise"
    generates: ClassVar[bool] = False
    distorts: ClassVar[bool] = True
    annotator: ClassVar[None] = None
    samples: ClassVar[int] = 1
    sampling: ClassVar[SamplingConfig] = SamplingConfig()
    mesh: ClassVar[None] = None
    noise_steps: int = 500
    """Diffusion steps of noise on the preprocessed image, of 1000."""

    def __post_init__(self):
        check_types(self, "online.")
        require(1 <= self.noise_steps <= 1000, "online.noise_steps", self.noise_steps, "from 1 to 1000")


@dataclass(frozen=True)
class OnlineRewards(Sampled):
    """Responses sampled from the policy, as many as the objective takes, each with a reward: for policy
    gradients (arXiv 2407.02477, section 3)."""

    maker: ClassVar[str] = "mllm_align.training.online.rewarded:Rewarded"
    rollout: ClassVar[bool] = True
    stale: ClassVar[bool] = False
    offline_share: ClassVar[float] = 0.0
    annotator: AnnotatorConfig = field(default_factory=default_annotator)
    """Who gives rewards: its scores, those of ties included. `--online.annotator KIND`; KIND may be a class
    in a file of your own, my_annotator.py:Mine."""
    minibatches: int = 1
    """Batches of prompts that the policy responds to at once; an update is taken on each."""
    epochs: int = 1
    """Updates on each of these responses."""
    reward_mean: float = 0.0
    """Taken from every reward, before it is divided by reward_deviation."""
    reward_deviation: float = 1.0
    """Every reward is divided by it."""
    reward_samples: int = 0
    """Responses of the policy as it starts, whose rewards give mean and deviation in place of these; they
    are kept in OUT/reward_scale.json. 0: none."""
    missing_end: float = 0.0
    """Taken from the reward, as scaled, of a response that reaches the limit without an end of sequence."""
    value_model: str | None = None
    """What PPO's value model starts from, a reward model's run from the same base with the same LoRA;
    default: the base, and a head of zeros."""
    max_kl: float | None = None
    """Stop when kl/sequence, the mean over responses in nats, is above it at a line of the log."""
    max_length: float | None = None
    """Stop when the mean length of responses in tokens is above it at a line of the log."""

    may_change: ClassVar[frozenset[str]] = frozenset({"mesh", "max_kl", "max_length"})

    def __post_init__(self):
        super().__post_init__()
        within(self, "online.", 1, 1024, "minibatches", "epochs")
        within(self, "online.", 0, LARGE, "max_kl", "max_length")
        samples = self.reward_samples
        require(samples == 0 or 2 <= samples <= LARGE, "online.reward_samples", samples, "0, or at least 2")
        measured = bool(samples) and (self.reward_mean, self.reward_deviation) != (0.0, 1.0)
        wanted = "0, or reward_mean and reward_deviation left out"
        require(not measured, "online.reward_samples", samples, wanted)
        within(self, "online.", -LARGE, LARGE, "reward_mean")
        within(self, "online.", 0, LARGE, "missing_end")
        deviation = self.reward_deviation
        require(0 < deviation <= LARGE, "online.reward_deviation", deviation, "above 0")

    @property
    def rounds(self) -> Rounds:
        return Rounds(self.minibatches, self.epochs)

    @property
    def limits(self) -> dict[str, tuple[str, float]]:
        given = {"kl/sequence": ("max_kl", self.max_kl), "rollout/tokens": ("max_length", self.max_length)}
        return {name: (field, limit) for name, (field, limit) in given.items() if limit is not None}

    def data_responses(self, compared: int) -> int:
        return 0

    def check(self, objective: str, compared: int) -> None:
        """Any number of responses."""


Online = OnlinePairs | OnlineBDHS | Distorted | OnlineRewards
ONLINE = {"pairs": OnlinePairs, "bdhs": OnlineBDHS, "distorted": Distorted, "rewards": OnlineRewards}
