"""Base, policy and reference as parameter trees.

`base` is the checkpoint as it was loaded, frozen. What is trained is a tree of its own:

    trained = {"params": replacements of parts of base, "lora": low-rank terms}

and of a reward model {"score": {"kernel": [D]}} beside them, the head on the last token's hidden state.
A value model is a reward model whose head is read before every token; PPO trains one beside the policy, as
{"value": a reward model's tree}.
The policy is base with those laid over it; the reference is base alone. So with LoRA there is no second
copy of the decoder, and the reference is always the one the run started from.
"""

from __future__ import annotations

from typing import Any

from mllm_align.batch import Prefix
from mllm_align.models.lora import scaled
from mllm_align.models.vlm import VisionLanguageModel, cast, variables

Tree = dict[str, Any]
SCORE = "score"
VALUE = "value"


def overlay(base: Tree, part: Tree) -> Tree:
    """base with the leaves of part in place of its own."""
    merged = dict(base)
    for name, value in part.items():
        below = merged.get(name)
        nested = isinstance(value, dict) and isinstance(below, dict)
        merged[name] = overlay(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def policy_variables(base: Tree, trained: Tree, lora_scale: float, dtype: Any) -> dict[str, Tree]:
    """The policy as `VisionLanguageModel.apply` takes it, everything in the dtype of the computation."""
    lora = trained.get("lora")
    params = cast(overlay(base, trained.get("params", {})), dtype)
    return variables(params, None if lora is None else cast(scaled(lora, lora_scale), dtype))


def policy_alone(trained: Tree) -> Tree:
    """What is trained, without a value model beside the policy."""
    if VALUE not in trained:
        return trained
    return {name: part for name, part in trained.items() if name != VALUE}


def image_features(model: VisionLanguageModel, of: Tree, prefix: Prefix, dtype: Any) -> Any:
    """[B, T*I, F]: the vision tower's features of a prefix's images, computed unless they are stored."""
    if prefix.features is None:
        return model.apply(of, prefix.pixels.astype(dtype), method="features")
    rows, tiles, count, width = prefix.features.shape
    return prefix.features.astype(dtype).reshape(rows, tiles * count, width)


def tower_is_trained(trained: Tree) -> bool:
    return "vision_tower" in trained.get("params", {})
