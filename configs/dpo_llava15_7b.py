"""DPO with LoRA on LLaVA 1.5-7B: as 1.6, on prompts of 576 image tokens."""

import dataclasses

from mllm_align import Config, DataConfig, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("llava15", "llava16"))
    return dataclasses.replace(base, data=DataConfig(multiple=64))
