"""What a model is made of, read from a checkpoint's own configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class VisionConfig(Protocol):
    """A vision tower as the rest of the program knows it; a family's own class has more.

    heads: of attention, between which the tensor axis of a mesh is cut. patches: N, of a tile. patch_width:
    C, numbers of a patch. tokens: I, features of a tile. features: F, their width.
    """

    @property
    def heads(self) -> int: ...
    @property
    def patches(self) -> int: ...
    @property
    def patch_width(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def features(self) -> int: ...


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's longer waves: those that turn less than `low` times in `original` tokens are slowed by
    `factor`, those that turn more than `high` times are kept, between them both are mixed."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class LinearRope:
    """All waves are slowed by `factor`."""

    factor: float


@dataclass(frozen=True)
class LocalLayers:
    """Layers that see a window, and have rotary frequencies of their own.

    layers: for each of a decoder's whether it is one. window: a query sees keys less than so many rotary
    positions before it.
    """

    layers: tuple[bool, ...]
    window: int
    rope_theta: float


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder: Vicuna, Mistral, Yi and Qwen2 differ only in these numbers, Gemma in a few
    settings."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | LinearRope | None = None
    local: LocalLayers | None = None
    """None where all layers see everything before them."""
    image_block: int = 0
    """The most embeddings of an image, which then see each other; 0 where all tokens see what is before
    them."""
    activation: str = "silu"
    query_scale: float = 1.0
    """What queries are multiplied by, beside head_dim^-0.5."""
    scaled_embedding: bool = False
    """Embeddings of text are multiplied by hidden^0.5."""
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """What is added to the gains of norms."""
    post_norms: bool = False
    """The results of attention and feed-forward are normed, too, before they are added."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """Queries and keys are normed, each head by itself, before they turn."""
    rope_sections: tuple[int, ...] = ()
    """How many frequencies turn by each axis of rotary positions (M-RoPE); empty for one axis."""
    rope_interleaved: bool = False
    """The axes take turns, and the first one has what the others leave; otherwise those of an axis follow
    each other."""
    tied: bool = False
    max_length: int = 4096
    """Tokens of prompt and response together that the checkpoint was made for."""

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """For each rotary frequency the axis of `Prefix.rope` that it turns by."""
        if not self.rope_interleaved:
            axes = [axis for axis, count in enumerate(self.rope_sections) for _ in range(count)]
            return tuple(axes) or (0,) * (self.head_dim // 2)
        out = [0] * (self.head_dim // 2)
        for axis, count in enumerate(self.rope_sections[1:], start=1):
            every = len(self.rope_sections)
            for place in range(axis, min(every * count, len(out)), every):
                out[place] = axis
        return tuple(out)

    @property
    def num_rope_axes(self) -> int:
        return max(len(self.rope_sections), 1)


@dataclass(frozen=True)
class ModelConfig:
    """What all families have. A family's own class adds its settings, with defaults."""

    family: str
    """Name in `families.registry.FAMILIES`: the model_type of config.json."""
    vision: VisionConfig
    decoder: DecoderConfig
    image_token: int
    int8: bool = field(default=False, kw_only=True)
    """Whether the matrices of blocks are kept in int8, and so are frozen (`models/quantised.py`)."""

    @property
    def newline(self) -> bool:
        """Whether row 0 of the image table is a learned vector, the parameter `image_newline`."""
        return False

    @property
    def joined(self) -> bool:
        """Whether the tower takes all tiles of a prompt as one sequence, and not each by itself."""
        return False

    @property
    def taps(self) -> int:
        """Further rows of the image table that an embedding may be mixed of (see `batch.Prefix`)."""
        return 0

    @property
    def parts(self) -> tuple[str, ...]:
        """Top-level parts of the parameter tree."""
        newline = ("image_newline",) if self.newline else ()
        return "vision_tower", "projector", *newline, "decoder"
