"""Model FLOPs of a batch: what the mathematics needs for its real tokens, padding left out."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from mllm_align.data.encode import Encoded
from mllm_align.models.config import DecoderConfig, ModelConfig
from mllm_align.models.families.registry import family_of

# Dense bfloat16 peak of one chip in FLOP/s, as the vendors publish it, by JAX's `device_kind`.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """Peak of all devices together; None where the device's figure is not known (CPUs)."""
    each = PEAK.get(jax.devices()[0].device_kind)
    return None if each is None else each * jax.device_count()


def vision_flops(config: ModelConfig, tiles: int) -> float:
    """Of the tower, forward. A matrix product of m x k by k x n counts 2 m k n."""
    return family_of(config).tower_flops(config, tiles)


def pairs(decoder: DecoderConfig, queries: int, before: int = 0) -> float:
    """Pairs of a query and a key that it sees, of tokens that follow `before` others: the mean of all
    layers. Causal attention counts its visible half, also of images that see themselves."""
    whole = queries * before + queries**2 / 2
    if decoder.local is None:
        return whole
    window, near = decoder.local.window, sum(decoder.local.layers)
    free = min(max(window - before, 0), queries)  # tokens that see everything before them there, too
    cut = free * before + free**2 / 2 + (queries - free) * window
    return whole + (cut - whole) * near / decoder.layers


def decoder_flops(config: ModelConfig, tiles: int, tokens: int, seen: float, predicted: int) -> float:
    """Of projector, decoder and vocabulary, forward. tokens: that are run. seen: `pairs` of all of them,
    summed. predicted: positions whose next token is asked for."""
    d, projector = config.decoder, family_of(config).projector_flops(config, tiles)
    width = d.heads * d.head_dim
    linear = d.hidden * (2 * width + 2 * d.kv_heads * d.head_dim + 3 * d.mlp)
    head = 2 * predicted * d.hidden * d.vocab
    return projector + d.layers * (2 * tokens * linear + 4 * seen * width) + head


def group_flops(
    config: ModelConfig, tiles: int, prefix: int, answers: Sequence[int], logits: bool = True
) -> tuple[float, float]:
    """(vision tower, the rest) of one forward pass over a prompt group, in FLOPs. prefix, answers: lengths
    in tokens. logits: with the vocabulary, which a reward model leaves out."""
    seen = pairs(config.decoder, prefix) + sum(pairs(config.decoder, n, prefix) for n in answers)
    predicted = 1 + sum(max(n - 1, 0) for n in answers) if logits else 0
    tokens = prefix + sum(answers)
    return vision_flops(config, tiles), decoder_flops(config, tiles, tokens, seen, predicted)


def forward_flops(config: ModelConfig, record: Encoded, logits: bool = True) -> tuple[float, float]:
    """(vision tower, the rest) of one forward pass over all prefixes of a record, in FLOPs."""
    shapes = [
        (each.shape.tiles, each.shape.prefix, [len(r) for r in each.responses]) for each in record.parts
    ]
    towers, rest = zip(*(group_flops(config, *shape, logits) for shape in shapes), strict=True)
    return sum(towers), sum(rest)


def train_flops(
    forward: tuple[float, float],
    *,
    lora: bool,
    tower: bool,
    reference: bool,
    values: bool = False,
    features: bool = False,
) -> float:
    """FLOPs of a train step on what takes `forward`. The backward pass costs two forward passes, one where
    the weights are frozen (LoRA); a frozen tower runs forward once, or not at all where its features are
    stored; a live reference is one more pass; a
    value model of the same size is trained like the policy.
    """
    vision, rest = forward
    passes = (2 if lora else 3) * (1 + values) + reference
    return rest * passes + vision * (3 * (1 + values) + reference if tower else not features)


def step_flops(
    config: ModelConfig,
    records: Sequence[Encoded],
    *,
    lora: bool,
    tower: bool,
    reference: bool,
    values: bool = False,
    logits: bool = True,
    features: bool = False,
) -> float:
    """FLOPs of a train step on these records; see `train_flops` and `group_flops`."""
    how = {"lora": lora, "tower": tower, "reference": reference, "values": values, "features": features}
    return sum(train_flops(forward_flops(config, record, logits), **how) for record in records)
