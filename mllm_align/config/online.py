"""Responses that the policy makes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from mllm_align.config.annotators import Annotator, JudgeModel
from mllm_align.config.bdhs import BDHSMethod
from mllm_align.config.checks import check_types, require, within
from mllm_align.config.parts import MeshConfig, SamplingConfig


@dataclass(frozen=True)
class OnlinePairs:
    """Responses sampled from the policy, the best and the worst by an annotator (online-DPO); with
    offline_share, examples that keep the pair of the data (mixed-DPO; arXiv 2407.02477, Eq. 4)."""

    annotator: Annotator = JudgeModel()
    """Who ranks; `--online.annotator judge|endpoint|oracle|questions|scorer` on the command line."""
    samples: int = 2
    """Responses sampled for each prompt."""
    offline_share: float = 0.0
    """Chance of an example to keep the pair that the data have (p); above 0 the data need pairs."""
    stale: bool = False
    """Let annotation of the next batch run while the device trains: its responses are then those of the
    policy one step earlier."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=256))
    mesh: MeshConfig | None = None
    """How the devices are cut while the policy samples; default: as in training. Where training cuts along
    fsdp, tensor is many times faster here, for a second copy of the base (docs/online.md)."""

    def __post_init__(self):
        check_types(self, "online.")
        within(self, "online.", 2, 1024, "samples")
        share = self.offline_share
        require(0 <= share < 1, "online.offline_share", share, "at least 0 and below 1")
        hot = self.sampling.temperature > 0
        require(hot, "online.sampling.temperature", self.sampling.temperature, "above 0: samples differ")


@dataclass(frozen=True)
class OnlineBDHS(BDHSMethod):
    """A rejected response by BDHS with the current policy, in every step; no annotator."""

    mesh: MeshConfig | None = None
    """How the devices are cut while the policy samples; default: as in training (docs/online.md)."""


@dataclass(frozen=True)
class Distorted:
    """A rejected response drawn token by token along the chosen one, under a noisy image (POVID-style)."""

    noise_steps: int = 500
    """Diffusion steps of noise on the preprocessed image, of 1000."""

    def __post_init__(self):
        check_types(self, "online.")
        require(1 <= self.noise_steps <= 1000, "online.noise_steps", self.noise_steps, "from 1 to 1000")


Online = OnlinePairs | OnlineBDHS | Distorted
ONLINE = {"pairs": OnlinePairs, "bdhs": OnlineBDHS, "distorted": Distorted}
