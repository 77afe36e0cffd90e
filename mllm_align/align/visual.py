"""Objectives that compare the chosen response under its image with the same response under another image.

Notation as in `pairwise.py`. m is the record's image, m~ the rejected image, which a second prefix shows;
u(y | m) is the log-ratio of y under an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_align.align.checks import check_setting
from mllm_align.align.contract import OBJECTIVES, Metrics, Objective, Scalar, Signals, Terms
from mllm_align.align.pairwise import DPO, figures, means
from mllm_align.batch import Responses

RejectedImage = Literal["crop", "noise", "record"]


@OBJECTIVES.register("visual")
@dataclass(frozen=True)
class Visual(Objective):
    """-log sigmoid(beta (u(y+ | m) - u(y+ | m~))): a preference between two images, given the response.

    The conditional preference of mDPO (Wang et al. 2024, arXiv 2406.11839), rDPO and CHiP alone, for
    weighted sums; rejected_image says what m~ is (`data/rejected_image.py`). No rejected response is
    needed.
    """

    responses = 1
    needs = frozenset({"reference"})
    beta: float = 0.1
    rejected_image: RejectedImage = "crop"  # type: ignore[misc]

    def __post_init__(self):
        check_setting("beta", self.beta, 0)

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {"image": responses.weight.sum()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        chosen, rejected = self.beta * chosen_ratios(signals)
        loss = -jax.nn.log_sigmoid(chosen - rejected)
        return Terms({"image": (loss * signals.weight).sum()}, image_figures(chosen, rejected, signals))


@OBJECTIVES.register("rdpo")
@dataclass(frozen=True)
class RDPO(Objective):
    """`DPO`'s loss + `Visual`'s, with one beta: rDPO of Re-Align (Xing et al. 2025, arXiv 2502.13146).

    m~ is an image that was retrieved for the record, its `rejected_images`. The released code scores y- and
    m~ by the likeliest token in place of the response's own; this is the paper's loss.
    """

    responses = 2
    needs = frozenset({"reference"})
    beta: float = 0.1
    rejected_image: RejectedImage = "record"  # type: ignore[misc]

    def __post_init__(self):
        check_setting("beta", self.beta, 0)

    @property
    def parts(self) -> tuple[DPO, Visual]:
        return DPO(self.beta), Visual(self.beta, self.rejected_image)

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {name: weight for part in self.parts for name, weight in part.weights(responses).items()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        pairs, image = (part(signals.of(part)) for part in self.parts)
        return Terms(pairs.sums | image.sums, pairs.metrics | image.metrics)


@OBJECTIVES.register("mdpo")
@dataclass(frozen=True)
class MDPO(RDPO):
    """`RDPO`'s loss - log sigmoid(beta u(y+ | m)) (mDPO; Wang et al. 2024, arXiv 2406.11839).

    The last term, the reward anchor, keeps the chosen response from becoming less likely together with the
    rejected one. m~ is a random part of the record's image.
    """

    rejected_image: RejectedImage = "crop"  # type: ignore[misc]

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return super().weights(responses) | {"anchor": responses.weight.sum()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        terms = super().__call__(signals, state)
        loss = -jax.nn.log_sigmoid(self.beta * chosen_ratios(signals)[0])
        return terms._replace(sums=terms.sums | {"anchor": (loss * signals.weight).sum()})


@OBJECTIVES.register("chip")
@dataclass(frozen=True)
class CHiP(Objective):
    """-log sigmoid(beta [s(y+ | m) - s(y- | m) + s(y+ | m) - s(y+ | m~) - alpha (D(y-) - D(y+))]).

    Cross-modal hierarchical DPO (Fu et al. 2025, arXiv 2501.16629) as its released code has it: response,
    segment, token and visual preferences in one sigmoid. s is the log-ratio with tokens counted
    segment_weight times where y+ and y- differ (`data/segments.py`); D sums KL(reference || policy) over a
    response's tokens, that of y+ without a gradient, as in TDPO (Zeng et al. 2024, arXiv 2404.11999). The
    released code weights the reference's sum under m~ by the response's length; here tokens are weighted
    alike everywhere.
    """

    responses = 2
    needs = frozenset({"reference", "kl", "changes"})
    beta: float = 0.1
    alpha: float = 0.1
    segment_weight: float = 4.0
    rejected_image: RejectedImage = "noise"  # type: ignore[misc]

    def __post_init__(self):
        check_setting("beta", self.beta, 0)
        check_setting("alpha", self.alpha, 0)
        check_setting("segment_weight", self.segment_weight, 0)

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        return {"pairs": responses.weight.sum()}

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        assert signals.reference is not None and signals.kl is not None
        changed = signals.responses.changed
        assert changed is not None
        each = jnp.where(changed, jnp.float32(self.segment_weight), jnp.float32(1))
        own, other = (
            ((policy - reference) * each[:, : policy.shape[1]]).sum(-1)
            for policy, reference in zip(signals.policy, signals.reference, strict=True)
        )
        kl = signals.kl.sum(-1)
        divergence = kl[:, 1] - jax.lax.stop_gradient(kl[:, 0])
        margin = own[:, 0] - own[:, 1] + own[:, 0] - other[:, 0] - self.alpha * divergence
        loss = -jax.nn.log_sigmoid(self.beta * margin)
        weight = signals.weight
        found = figures(self.beta * own, signals.policy[0].sum(-1), weight)
        found |= image_figures(self.beta * own[:, 0], self.beta * other[:, 0], signals)
        found |= means({"kl/chosen": kl[:, 0], "kl/rejected": kl[:, 1]}, weight)
        return Terms({"pairs": (loss * weight).sum()}, found)


def chosen_ratios(signals: Signals) -> Float[Array, "2 B"]:
    """Log-ratios of the chosen responses under the image and under the rejected image, nats."""
    if signals.reference is None:
        raise ValueError("images are compared relative to a reference; none was given")
    pairs = zip(signals.policy, signals.reference, strict=True)
    return jnp.stack([(policy[:, 0] - reference[:, 0]).sum(-1) for policy, reference in pairs])


def image_figures(chosen: Float[Array, " B"], rejected: Float[Array, " B"], signals: Signals) -> Metrics:
    """What is logged of two images. chosen, rejected: rewards of the chosen response under them."""
    each = {
        "rewards/chosen": chosen,
        "rewards/rejected_image": rejected,
        "rewards/visual_margin": chosen - rejected,
        "rewards/visual_accuracy": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": signals.policy[0][:, 0].sum(-1),
        "logps/rejected_image": signals.policy[1][:, 0].sum(-1),
    }
    return means(each, signals.weight)
