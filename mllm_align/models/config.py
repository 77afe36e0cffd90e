"""What a model is made of, read from a checkpoint's own configuration."""

from __future__ import annotations

from dataclasses import dataclass
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
class DecoderConfig:
    """A Llama-family decoder: Vicuna, Mistral, Yi and Qwen2 differ only in these numbers."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    norm_eps: float = 1e-6
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
