"""The contract of an objective: log-probabilities in, sums of its terms out.

An objective is a frozen dataclass of its settings. Its loss on a batch is

    sum over terms i of S_i / W_i

S_i is a sum over the batch that the objective computes, W_i what it divides by, known from masks and group
weights alone. Sums and weights of micro-batches, devices and hosts therefore add up to those of the whole
batch, also where terms have different denominators (pairs and tokens, say).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
from jaxtyping import Array, Bool, Float

from mllm_align.batch import Responses
from mllm_align.registry import Registry

Scalar = Float[Array, ""]
Metrics = dict[str, tuple[Scalar, Scalar]]
"""Name -> (sum, weight); divided once, when logged."""
Views = tuple[tuple[int, ...], ...]

REJECTED_IMAGES = ("crop", "noise", "record")
"""What the second prefix of a group shows (`data/rejected_image.py`): the record's images cut to a small
part, or under noise, or other images that the record names."""

FIELDS = {"rollout": ("old", "advantages"), "values": ("values", "returns")}
"""Entry of `Objective.needs` -> fields of `batch.Responses` that come with it."""

OBJECTIVES = Registry("objective", "mllm_align.align")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Signals:
    """What an objective may look at.

    policy, reference: log-probabilities of each view's responses, nats per token, 0 at padding. reference
    is None for an objective that does not need it. responses: tokens, mask [B, K, R], group weights [B].
    views: as in `batch.PromptGroup`. scores: of an objective that needs them, one for each response from a
    linear head on its last token; policy is then empty, as no token is predicted. values: of an objective
    that needs them, what a value model makes of the state that predicts each token. kl: likewise,
    KL(reference || policy) of the distribution that predicts each token of the first view, nats.
    """

    policy: tuple[Float[Array, "B k R"], ...]
    reference: tuple[Float[Array, "B k R"], ...] | None
    responses: Responses
    views: Views = dataclasses.field(metadata={"static": True})
    scores: Float[Array, "B K"] | None = None
    values: Float[Array, "B K R"] | None = None
    kl: Float[Array, "B K R"] | None = None

    @property
    def weight(self) -> Float[Array, " B"]:
        return self.responses.weight

    def mask(self, view: int = 0) -> Bool[Array, "B k R"]:
        """True at the tokens of a view's responses."""
        return self.responses.take(self.views[view]).mask

    def of(self, objective: Objective) -> Signals:
        """What an objective of fewer responses, or of fewer prefixes, sees of these groups."""
        views = objective.views
        if self.views == views:
            return self

        def part(logps: Any) -> Any:
            return tuple(each[:, : len(view)] for each, view in zip(logps, views, strict=False))

        reference = None if self.reference is None else part(self.reference)
        responses = self.responses.take(tuple(range(objective.responses)))
        return Signals(part(self.policy), reference, responses, views)


class Terms(NamedTuple):
    """sums: S_i of every term, coefficients included. metrics: for the log. stats: sums that
    `Objective.update` takes; the same tree for every micro-batch."""

    sums: dict[str, Scalar]
    metrics: Metrics
    stats: Any = ()


@dataclass(frozen=True)
class Objective:
    """Base class of objectives; subclasses are frozen dataclasses.

    responses: K, how many each group has. made: how many of them, the last ones, only the policy can make
    (`Config.online`). borrowed: how many, the last ones, are those of another record of the batch.
    unpaired: a group may lack the chosen or the rejected response, which is then empty. needs: what is
    computed for it beside the policy's log-probabilities, or given with its batches, of `checks.AVAILABLE`.
    rejected_image: what a second prefix shows, of REJECTED_IMAGES; None for groups of one prefix.
    references: models beside the run's reference whose log-probabilities it needs, by folder or name.
    """

    responses: ClassVar[int]
    made: ClassVar[int] = 0
    borrowed: ClassVar[int] = 0
    unpaired: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def rejected_image(self) -> str | None:
        """A class attribute or a field of those that have one."""
        return None

    @property
    def references(self) -> tuple[str, ...]:
        """A field of those that have some."""
        return ()

    @property
    def views(self) -> Views:
        """Which responses continue which prefix: all of them the record's own, and the chosen one that with
        the rejected image."""
        own = tuple(range(self.responses))
        return (own,) if self.rejected_image is None else (own, (0,))

    @property
    def of_record(self) -> int:
        """How many responses of its own a group has."""
        return self.responses - self.borrowed

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of `batch.Responses` that only a rollout gives."""
        return tuple(name for need, names in FIELDS.items() if need in self.needs for name in names)

    @property
    def held_out(self) -> Objective:
        """The objective of held-out records, for which the policy makes no responses."""
        return self

    def weights(self, responses: Responses) -> dict[str, Scalar]:
        """W_i of every term for one micro-batch; those of a batch are their sums."""
        raise NotImplementedError

    def __call__(self, signals: Signals, state: Any = ()) -> Terms:
        """The terms of one micro-batch. state: from before the step."""
        raise NotImplementedError

    def init_state(self) -> Any:
        """A tree of arrays that is kept from step to step, saved and resumed; default: none."""
        return ()

    def update(self, state: Any, stats: Any) -> Any:
        """The state after a step. stats: `Terms.stats` summed over the whole batch."""
        return state
