"""The prompt group: one or more prefixes, and the K responses that are compared on them.

Every algorithm here compares responses to one prompt, so this is the one batch contract of the package.
A prefix (image embeddings and prompt) is stored, and run, once; each response continues it. Losses that
compare images have a second prefix, the same prompt with another image, which some of the responses
continue as well.

Shapes: B groups, K responses, P prefix tokens, R response tokens, T image tiles of one prefix,
I embeddings of one tile, A axes of rotary positions, W further rows that an embedding is mixed of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Pixels(NamedTuple):
    """Preprocessed images, cut into patches; of one record without the axis B.

    patches: the pixels and channels of each patch, in the order in which the tower multiplies them.
    place: (row, column) of each patch in its tile; -1 for a patch that only fills the tile.
    """

    patches: Float[Array | np.ndarray, "B T N C"]
    place: Int[Array | np.ndarray, "B T N 2"]

    def astype(self, dtype: Any) -> Pixels:
        """The patches in the dtype of the computation."""
        return self._replace(patches=self.patches.astype(dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """B prompts, padded to one length. Real tokens stand at the start of their row.

    What a padded place holds never reaches a number: `visible` and `length` say what is real.

    tokens: vocabulary ids; at image places the checkpoint's image token.
    image: -1 at text, else a row of the prefix's image table: 0 is the `image_newline` vector,
        1 + t * I + i is embedding i of tile t.
    taps, mix: of families that resample images: W further rows that an embedding is mixed of, and their
        shares; the row `image` has what is left of 1. None where every embedding is a row.
    order: attention; a query sees a key whose order is not later than its own. It rises along a row, but
        for embeddings that see each other, which have one order.
    rope: rotary positions, one for each axis.
    visible: False where a key is attended to by nothing (padding; masked image embeddings).
    length: how many of the P places are real. The last real one predicts each response's first token.
    patches, place: of the images, as in `Pixels`; None where the tower's features are known.
    features: what a frozen tower gives for each tile, where that was computed beforehand.
    """

    tokens: Int[Array, "B P"]
    image: Int[Array, "B P"]
    order: Int[Array, "B P"]
    rope: Int[Array, "B A P"]
    visible: Bool[Array, "B P"]
    length: Int[Array, " B"]
    patches: Float[Array, "B T N C"] | None = None
    place: Int[Array, "B T N 2"] | None = None
    features: Float[Array, "B T I F"] | None = None
    taps: Int[Array, "B W P"] | None = None
    mix: Float[Array, "B W P"] | None = None

    @property
    def pixels(self) -> Pixels:
        """Of a prefix that has them."""
        assert self.patches is not None and self.place is not None
        return Pixels(self.patches, self.place)

    @property
    def tiles(self) -> int:
        """T."""
        return (self.pixels.patches if self.features is None else self.features).shape[-3]

    @property
    def last(self) -> Int[Array, "B 1"]:
        """Index of the last real token."""
        return (self.length - 1)[:, None]

    def after(self, steps: int) -> tuple[Int[Array, "B R"], Int[Array, "B A R"]]:
        """(order, rope) of `steps` tokens of text that continue the prefix."""
        offset = 1 + jnp.arange(steps, dtype=self.order.dtype)
        order = jnp.take_along_axis(self.order, self.last, axis=1) + offset[None]
        rope = jnp.take_along_axis(self.rope, self.last[:, None], axis=2) + offset[None, None]
        return order, rope


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    """B x K responses, padded to one length.

    tokens, mask: each response with its end of sequence; mask is False at padding.
    weight: 0 for a group that only fills the batch.
    reference: nats per token under the reference, where computed beforehand: of each view's responses.
    references: likewise under each of Q further references, of the first view's responses.
    sampler: nats per token under the policy that sampled the response; 0 elsewhere.
    changed: True at tokens in which chosen and rejected response differ (`data/segments.py`).

    Of policy gradients (`align/policy_gradient.py`), per token and 0 at padding:
    old: nats under the policy that sampled the response, by the forward pass of training.
    advantages: one that belongs to the whole response stands at each of its tokens.
    returns, values: what a value model should have said of the state before the token, and what it said.
    """

    tokens: Int[Array, "B K R"]
    mask: Bool[Array, "B K R"]
    weight: Float[Array, " B"]
    reference: tuple[Float[Array, "B k R"], ...] | None = None
    references: Float[Array, "B Q K R"] | None = None
    sampler: Float[Array, "B K R"] | None = None
    changed: Bool[Array, "B K R"] | None = None
    old: Float[Array, "B K R"] | None = None
    advantages: Float[Array, "B K R"] | None = None
    returns: Float[Array, "B K R"] | None = None
    values: Float[Array, "B K R"] | None = None

    def take(self, which: tuple[int, ...]) -> Responses:
        """Tokens, mask and weight of some of the K responses."""
        if which == tuple(range(self.tokens.shape[1])):
            return Responses(self.tokens, self.mask, self.weight)
        places = np.array(which)
        return Responses(self.tokens[:, places], self.mask[:, places], self.weight)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptGroup:
    """B groups: prefixes, responses, and which responses continue which prefix.

    views: for each prefix the numbers of its responses; static. DPO has ((0, 1),): one prefix, continued by
        chosen and rejected. A second prefix that the chosen response alone continues makes it
        ((0, 1), (0,)).
    source: the number of each group's data set, where several are mixed.
    """

    prefixes: tuple[Prefix, ...]
    responses: Responses
    views: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    source: Int[Array, " B"] | None = None

    @property
    def prefix(self) -> Prefix:
        """That of the record's own images."""
        return self.prefixes[0]

    @property
    def shape(self) -> Shape:
        sizes = [(p.tokens.shape[-1], p.tiles) for p in self.prefixes]
        return Shape(sizes[0][0], self.responses.tokens.shape[-1], sizes[0][1], tuple(sizes[1:]))


@dataclass(frozen=True, order=True)
class Shape:
    """The padded lengths of a group: prefix tokens, tokens of each response, image tiles.

    others: (prefix tokens, image tiles) of further prefixes.
    """

    prefix: int
    response: int
    tiles: int
    others: tuple[tuple[int, int], ...] = ()

    def holds(self, other: Shape) -> bool:
        return self.union(other) == self

    def union(self, other: Shape) -> Shape:
        return Shape(
            max(self.prefix, other.prefix),
            max(self.response, other.response),
            max(self.tiles, other.tiles),
            tuple(
                (max(one[0], two[0]), max(one[1], two[1]))
                for one, two in zip(self.others, other.others, strict=True)
            ),
        )

    @property
    def prefixes(self) -> tuple[tuple[int, int], ...]:
        """(prefix tokens, image tiles) of every prefix."""
        return (self.prefix, self.tiles), *self.others

    def tokens(self, views: Sequence[Sequence[int]]) -> int:
        """Of a padded row: every prefix with the responses that continue it."""
        pairs = zip(self.prefixes, views, strict=True)
        return sum(prefix + len(view) * self.response for (prefix, _), view in pairs)


# ---- on the host, one group at a time ----------------------------------------------------------------


@dataclass(frozen=True)
class HostPrefix:
    """One prompt of p tokens before padding: numpy arrays as in `Prefix`, without its axis B.

    patches [t, N, C] float32 and place [t, N, 2] int16, or features [t, I, F], or neither; taps [W, p]
    int32 and mix [W, p] float32, or None.
    """

    tokens: np.ndarray
    image: np.ndarray
    order: np.ndarray
    rope: np.ndarray
    visible: np.ndarray
    patches: np.ndarray | None = None
    place: np.ndarray | None = None
    features: np.ndarray | None = None
    taps: np.ndarray | None = None
    mix: np.ndarray | None = None

    @classmethod
    def causal(
        cls, tokens: np.ndarray, image: np.ndarray, pixels: Pixels | None = None, **mixed: Any
    ) -> HostPrefix:
        """Every token sees those before it; one axis of rotary positions that counts tokens. mixed: taps
        and mix."""
        at = np.arange(len(tokens), dtype=np.int32)
        return cls(tokens, image, at, at[None], np.ones(len(tokens), bool), *(pixels or ()), **mixed)  # type: ignore[arg-type]

    @property
    def pixels(self) -> Pixels:
        """Of a prefix that has them."""
        assert self.patches is not None and self.place is not None
        return Pixels(self.patches, self.place)

    @property
    def tiles(self) -> int:
        found = self.patches if self.features is None else self.features
        return 0 if found is None else len(found)

    def keep(self, places: np.ndarray) -> HostPrefix:
        """The prefix without its other tokens; those kept keep order and rotation. places [p] bool."""
        names = ("tokens", "image", "order", "rope", "visible", *(("taps", "mix") if self.mixed else ()))
        return dataclasses.replace(self, **{name: getattr(self, name)[..., places] for name in names})

    @property
    def mixed(self) -> bool:
        return self.taps is not None


@dataclass(frozen=True)
class Group:
    """One record as the model gets it, before padding. responses: K arrays of ids. views: as in
    `PromptGroup`; default: all responses continue the first prefix, the first one the others, too."""

    prefixes: tuple[HostPrefix, ...]
    responses: tuple[np.ndarray, ...]
    views: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if not self.views:
            others = ((0,),) * (len(self.prefixes) - 1)
            object.__setattr__(self, "views", (tuple(range(len(self.responses))), *others))

    @property
    def prefix(self) -> HostPrefix:
        """That of the record's own images."""
        return self.prefixes[0]

    @property
    def shape(self) -> Shape:
        longest = max((len(r) for r in self.responses), default=0)
        sizes = [(len(p.tokens), p.tiles) for p in self.prefixes]
        return Shape(sizes[0][0], longest, sizes[0][1], tuple(sizes[1:]))


def pad(groups: Sequence[Group], shape: Shape, size: int) -> PromptGroup:
    """Stack groups into a PromptGroup of `size` rows; missing rows repeat the first with weight 0.

    A repeated row, not zeros: every arithmetic result of a filler row stays finite.
    Raises ValueError if a group does not fit `shape`: nothing is ever cut.
    """
    for group in groups:
        if not shape.holds(group.shape):
            raise ValueError(f"a group of {group.shape} does not fit a batch of {shape}")
    rows = [*groups, *[groups[0]] * (size - len(groups))]
    prefixes = tuple(
        pad_prefixes([row.prefixes[i] for row in rows], *sizes) for i, sizes in enumerate(shape.prefixes)
    )
    count = len(rows[0].responses)  # 0 for prompts alone, whose responses are still to be made
    tokens = np.zeros((size, count, shape.response), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, group in enumerate(rows):
        for k, response in enumerate(group.responses):
            tokens[row, k, : len(response)], mask[row, k, : len(response)] = response, True
    weight = (np.arange(size) < len(groups)).astype(np.float32)
    responses = Responses(tokens, mask, weight)  # type: ignore[arg-type]
    return PromptGroup(prefixes, responses, rows[0].views)


def pad_prefixes(rows: Sequence[HostPrefix], length: int, tiles: int | None = None) -> Prefix:
    """Stack prefixes, padded to `length` tokens and `tiles` tiles (None: without pixels and features)."""

    def images(name: str, fill: int = 0) -> Any:
        if tiles is None or getattr(rows[0], name) is None:
            return None
        return np.stack([padded(getattr(row, name), tiles, fill) for row in rows])

    def stacked(name: str, fill: int | bool = 0) -> Any:
        return np.stack([padded(getattr(row, name), length, fill, axis=-1) for row in rows])

    return Prefix(
        tokens=stacked("tokens"),
        image=stacked("image", -1),
        order=stacked("order"),
        rope=stacked("rope"),
        visible=stacked("visible", False),
        length=np.array([len(row.tokens) for row in rows], np.int32),  # type: ignore[arg-type]
        patches=images("patches"),
        place=images("place", -1),
        features=images("features"),
        **({"taps": stacked("taps"), "mix": stacked("mix")} if rows[0].mixed else {}),
    )


def padded(array: Any, length: int, fill: int | bool = 0, axis: int = 0) -> np.ndarray:
    """The array, lengthened along an axis."""
    shape = list(array.shape)
    shape[axis] = length
    out = np.full(shape, fill, array.dtype)
    np.moveaxis(out, axis, 0)[: array.shape[axis]] = np.moveaxis(array, axis, 0)
    return out


def stack(batches: Sequence[PromptGroup]) -> PromptGroup:
    """Micro-batches of one shape, stacked on a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def with_responses(group: PromptGroup, **fields: Any) -> PromptGroup:
    """The group with these fields of its responses replaced."""
    return dataclasses.replace(group, responses=dataclasses.replace(group.responses, **fields))


# ---- shapes alone ------------------------------------------------------------------------------------


def blank(
    make: Callable[[tuple[int, ...], Any], Any],
    shape: Shape,
    tile: tuple[int, int],
    views: tuple[tuple[int, ...], ...],
    axes: int,
    taps: int = 0,
    reference: bool = False,
    changed: bool = False,
    fields: Sequence[str] = (),
    features: tuple[int, int, Any] | None = None,
    references: int = 0,
) -> PromptGroup:
    """A group whose leaves are make(shape without the leading axes, dtype): for tracing and compiling.

    tile: (patches, numbers of a patch) of one tile. axes: of rotary positions. taps: W, 0 for none.
    reference: with stored log-probs. changed: with that field of the responses. fields: further ones, a
    number for each token.
    features: (I, F, dtype) of a tile, stored in place of its patches. references: Q, how many further ones.
    """

    def images(tiles: int) -> dict[str, Any]:
        if features is not None:
            *sizes, dtype = features
            return {"features": make((tiles, *sizes), dtype)}
        return {"patches": make((tiles, *tile), jnp.float32), "place": make((tiles, tile[0], 2), jnp.int16)}

    count = 1 + max((k for view in views for k in view), default=-1)
    answer = (count, shape.response)
    stored = tuple(make((len(view), shape.response), jnp.float32) for view in views)
    prefixes = tuple(
        blank_prefix(make, length, axes, taps, **images(tiles)) for length, tiles in shape.prefixes
    )
    responses = Responses(
        tokens=make(answer, jnp.int32),
        mask=make(answer, jnp.bool_),
        weight=make((), jnp.float32),
        reference=stored if reference else None,
        references=make((references, *answer), jnp.float32) if references else None,
        changed=make(answer, jnp.bool_) if changed else None,
        **{name: make(answer, jnp.float32) for name in fields},
    )
    return PromptGroup(prefixes, responses, views)


def blank_prefix(
    make: Callable[[tuple[int, ...], Any], Any], length: int, axes: int, taps: int = 0, **images: Any
) -> Prefix:
    """As `blank`: one prefix. images: its fields that hold them."""
    return Prefix(
        tokens=make((length,), jnp.int32),
        image=make((length,), jnp.int32),
        order=make((length,), jnp.int32),
        rope=make((axes, length), jnp.int32),
        visible=make((length,), jnp.bool_),
        length=make((), jnp.int32),
        **images,
        taps=make((taps, length), jnp.int32) if taps else None,
        mix=make((taps, length), jnp.float32) if taps else None,
    )
