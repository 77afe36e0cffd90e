"""Pairs relative to several references. Notation as in `pairwise.py`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_align.align.checks import check_flag, check_setting
from mllm_align.align.contract import OBJECTIVES, Signals
from mllm_align.align.pairwise import DPO
from mllm_align.errors import InputError

NONE = "objective.references is empty; name folders or runs of other models (--objective.references A B)"


@OBJECTIVES.register("mrpo")
@dataclass(frozen=True)
class MRPO(DPO):
    """`DPO`'s loss with (sum over k of a_k / p_k(y))^-1 in place of the reference's probability of y.

    Multi-reference preference optimization (Le et al. 2024, arXiv 2405.16388). p_1 is the run's own
    reference, the others are those of `references`: folders or names of models, or runs. log p_k(y) of
    these is clipped to log p_1(y) (1 +- c_y), where c_y is clip |m(y)| / (|m(y+)| + |m(y-)|) and m the mean
    of log p_k over all references. a_k is |log p_k(y+) - log p_k(y-)|, before clipping, by its sum over k;
    without `adaptive` all a_k are alike. In the released code, which has two references, the two a_k stand
    in each other's place.
    """

    needs = frozenset({"reference", "references"})
    references: tuple[str, ...] = ()  # type: ignore[misc]
    clip: float = 0.1
    adaptive: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_setting("clip", self.clip, 0, 1)
        check_flag("adaptive", self.adaptive)

    def reference(self, signals: Signals) -> Float[Array, "B K"]:
        others = signals.responses.references
        if others is None:
            raise InputError(NONE)
        own = super().reference(signals)
        return mixture(jnp.concatenate([own[:, None], others.sum(-1)], 1), self.clip, self.adaptive)


def mixture(logps: Float[Array, "B N 2"], clip: float, adaptive: bool) -> Float[Array, "B 2"]:
    """What `MRPO` takes for the reference's log-probabilities. logps: of chosen and rejected responses
    under N references, that of the run first, nats per sequence."""
    confidence = jnp.abs(logps[..., 0] - logps[..., 1])
    total = confidence.sum(1, keepdims=True)
    uniform = jnp.full_like(confidence, 1 / confidence.shape[1])
    known = (total > 0) & adaptive
    shares = jnp.where(known, confidence / jnp.where(known, total, 1), uniform)
    sizes = jnp.abs(logps.mean(1))
    first, reach = logps[:, :1], clip * sizes / jnp.maximum(sizes.sum(-1, keepdims=True), 1e-9)
    width = jnp.abs(first) * reach[:, None]
    near = jnp.clip(logps, first - width, first + width)
    return -jax.nn.logsumexp(-near, axis=1, b=shares[..., None])
