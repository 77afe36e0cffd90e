"""A model of LLaVA-1.6's shape and of few numbers, and configs for it."""

import dataclasses

from mllm_align import DPO, SFT, Averaged, Config, Distorted
from mllm_align.models.families.registry import presets

PRESETS = presets()

OF_RESPONSES = {1: SFT(), 2: DPO(), 3: Averaged()}


def small(**changes):
    base = PRESETS["llava-1.6-7b"]
    decoder = dataclasses.replace(
        base.decoder, vocab=1024, hidden=1024, mlp=2048, layers=3, heads=8, kv_heads=8
    )
    vision = dataclasses.replace(base.vision, layers=2)
    return dataclasses.replace(base, decoder=decoder, vision=vision, **changes)


def planned_for(responses):
    """A config that trains on so many responses of each prompt."""
    online = Distorted() if responses == 3 else None
    return Config(objective=OF_RESPONSES[responses], online=online)
