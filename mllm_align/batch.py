"""The prompt group: one prompt and the K responses that are compared on it.

Every algorithm here compares responses to one prompt, so this is the one batch contract of the house.
The prefix (image embeddings and prompt) is stored, and run, once; each response continues it.

Shapes: B groups, K responses, P prefix tokens, R response tokens, T image tiles of one group,
I embeddings of one tile.
"""

from __future__ import annotations

import dataclasses
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
class PromptGroup:
    """B prompts with K responses each, padded to one shape.

    What a padded place holds never reaches a number: `prefix_length`, `response_mask` and `weight` say
    what is real. Real tokens stand at the start of their row, in the order of their positions.

    pixels: of the group's images.
    prefix_tokens: vocabulary ids; at image places the checkpoint's image token.
    prefix_image: -1 at text, else a row of the group's image table: 0 is the `image_newline` vector,
        1 + t * I + i is embedding i of tile t.
    prefix_positions: rotary positions; they rise along a row but need not be array indices.
    prefix_visible: False where a key is attended to by nothing (padding; masked image embeddings).
    prefix_length: how many of the P places are real. The last real one predicts each response's first
        token, and the responses' positions go on after its position.
    response_tokens, response_mask: each response with its end of sequence.
    weight: 0 for a group that only fills the batch.
    reference_logps: nats per token, where they were computed beforehand.
    sampler_logps: nats per token, as they were when the policy sampled the response; 0 elsewhere.
    """

    pixels: Pixels
    prefix_tokens: Int[Array, "B P"]
    prefix_image: Int[Array, "B P"]
    prefix_positions: Int[Array, "B P"]
    prefix_visible: Bool[Array, "B P"]
    prefix_length: Int[Array, " B"]
    response_tokens: Int[Array, "B K R"]
    response_mask: Bool[Array, "B K R"]
    weight: Float[Array, " B"]
    reference_logps: Float[Array, "B K R"] | None = None
    sampler_logps: Float[Array, "B K R"] | None = None

    @property
    def shape(self) -> Shape:
        return Shape(
            prefix=self.prefix_tokens.shape[-1],
            response=self.response_tokens.shape[-1],
            tiles=self.pixels.patches.shape[-3],
        )


@dataclass(frozen=True, order=True)
class Shape:
    """The padded lengths of a group: prefix tokens, tokens of each response, image tiles."""

    prefix: int
    response: int
    tiles: int

    def holds(self, other: Shape) -> bool:
        return self.prefix >= other.prefix and self.response >= other.response and self.tiles >= other.tiles

    def union(self, other: Shape) -> Shape:
        return Shape(
            max(self.prefix, other.prefix),
            max(self.response, other.response),
            max(self.tiles, other.tiles),
        )


@dataclass(frozen=True)
class Group:
    """One record as the model gets it, before padding: numpy arrays on the host.

    pixels: patches [t, N, C] float32, place [t, N, 2] int16. prefix_tokens, prefix_image [p] int32.
    responses: K arrays of ids.
    """

    pixels: Pixels
    prefix_tokens: np.ndarray
    prefix_image: np.ndarray
    responses: tuple[np.ndarray, ...]

    @property
    def shape(self) -> Shape:
        return Shape(
            len(self.prefix_tokens),
            max((len(r) for r in self.responses), default=0),
            len(self.pixels.patches),
        )


def pad(groups: list[Group], shape: Shape, size: int) -> PromptGroup:
    """Stack groups into a PromptGroup of `size` rows; missing rows repeat the first with weight 0.

    A repeated row, not zeros: every arithmetic result of a filler row stays finite.
    Raises ValueError if a group does not fit `shape`: nothing is ever cut.
    """
    for group in groups:
        if not shape.holds(group.shape):
            raise ValueError(f"a group of {group.shape} does not fit a batch of {shape}")
    rows = groups + [groups[0]] * (size - len(groups))

    def place(arrays: list[np.ndarray], length: int, fill: int = 0) -> np.ndarray:
        out = np.full((len(arrays), length, *arrays[0].shape[1:]), fill, arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[: len(array)] = array
        return out

    lengths = np.array([len(g.prefix_tokens) for g in rows], np.int32)
    real = np.arange(shape.prefix) < lengths[:, None]
    nothing = np.zeros((0, shape.response), np.int32)  # prompts alone: responses are still to be made
    tokens = [place(list(g.responses), shape.response) if g.responses else nothing for g in rows]
    masks = [
        place([np.ones(len(r), bool) for r in g.responses], shape.response) if g.responses else nothing > 0
        for g in rows
    ]
    return PromptGroup(
        pixels=Pixels(
            place([g.pixels.patches for g in rows], shape.tiles),  # type: ignore[arg-type]
            place([g.pixels.place for g in rows], shape.tiles, -1),  # type: ignore[arg-type]
        ),
        prefix_tokens=place([g.prefix_tokens for g in rows], shape.prefix),  # type: ignore[arg-type]
        prefix_image=place([g.prefix_image for g in rows], shape.prefix, -1),  # type: ignore[arg-type]
        prefix_positions=np.where(real, np.arange(shape.prefix), 0).astype(np.int32),  # type: ignore[arg-type]
        prefix_visible=real,  # type: ignore[arg-type]
        prefix_length=lengths,  # type: ignore[arg-type]
        response_tokens=np.stack(tokens),  # type: ignore[arg-type]
        response_mask=np.stack(masks),  # type: ignore[arg-type]
        weight=(np.arange(size) < len(groups)).astype(np.float32),  # type: ignore[arg-type]
    )


def stack(batches: list[PromptGroup]) -> PromptGroup:
    """Micro-batches of one shape, stacked on a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def response_positions(group: PromptGroup) -> Int[Array, "B K R"]:
    """Positions of the response tokens: they restart after the true end of the prefix."""
    last = (group.prefix_length - 1)[:, None]
    start = jnp.take_along_axis(group.prefix_positions, last, axis=1) + 1
    offset = jnp.arange(group.response_tokens.shape[-1], dtype=start.dtype)
    row = start + offset[None, :]
    return jnp.broadcast_to(row[:, None, :], group.response_tokens.shape)


def replace(group: PromptGroup, **fields) -> PromptGroup:
    return dataclasses.replace(group, **fields)
