"""What a model is made of, read from a checkpoint's own configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer. `layers` counts those that are run: up to the feature layer."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    keep_class_token: bool = False

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Embeddings of one tile as the projector gets them."""
        return self.side**2 + int(self.keep_class_token)


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder: Vicuna, Mistral and Yi differ only in these numbers."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    max_length: int = 4096
    """Tokens of prompt and response together that the checkpoint was made for."""

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """For each rotary frequency the axis of `Prefix.rope` that it turns by."""
        return (0,) * (self.head_dim // 2)

    @property
    def num_rope_axes(self) -> int:
        return 1 + max(self.rope_axes)


@dataclass(frozen=True)
class LlavaConfig:
    """LLaVA 1.5 (`pinpoints` empty: one square tile an image) or 1.6 (AnyRes tiles and `image_newline`)."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token: int
    projector_activation: str = "gelu"
    projector_bias: bool = True
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Canvas sizes (height, width) in pixels that an AnyRes image may be fitted into."""

    @property
    def anyres(self) -> bool:
        return bool(self.pinpoints)
