"""Bias-driven hallucination sampling: the method, and the job that writes a file of pairs by it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mllm_align.config.checks import MANY, check_types, require, within
from mllm_align.config.parts import JobConfig, SamplingConfig


@dataclass(frozen=True)
class BDHSMethod:
    """Rejected responses made by the policy (bias-driven hallucination sampling, arXiv 2407.02477)."""

    distortion: Literal["attention", "noise", "retrieved"] = "attention"
    """What misleads the policy: image embeddings that nothing attends to, a noisy image, or the record's
    neighbour images (`data retrieve`), one a try."""
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

    def __post_init__(self):
        check_types(self)
        require(0 <= self.mask_rate <= 1, "mask_rate", self.mask_rate, "from 0 to 1")
        require(1 <= self.noise_steps <= 1000, "noise_steps", self.noise_steps, "from 1 to 1000")
        within(self, "", 1, 1000, "iterations")
        within(self, "", 1, MANY, "sentence_tokens")
        require(self.similarity != "", "similarity", self.similarity, "a name or a folder")
        good = self.threshold is None or -1000 <= self.threshold <= 1000
        require(good, "threshold", self.threshold, "a finite number from -1000 to 1000, or None")


@dataclass(frozen=True)
class BDHSConfig(BDHSMethod, JobConfig):
    """A job of BDHS over a file of records."""

    micro_batches: ClassVar[int] = 1

    def __post_init__(self):
        JobConfig.__post_init__(self)
        BDHSMethod.__post_init__(self)

    @property
    def rows_per_micro(self) -> int:
        return self.batch_size
