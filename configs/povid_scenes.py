"""POVID-style on Scenes: rejected responses drawn token by token along the caption, under a noisy image."""

import dataclasses

from mllm_align import Config, Distorted, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("povid", "online_bdhs"))
    return dataclasses.replace(base, online=Distorted(noise_steps=500))
