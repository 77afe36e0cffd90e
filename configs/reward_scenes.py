"""A reward model on Scenes, from the quickstart's SFT model and pairs."""

import dataclasses

from mllm_align import Config, Reward, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("reward", "online_bdhs"))
    optim = dataclasses.replace(base.optim, learning_rate=7e-4)
    return dataclasses.replace(base, objective=Reward(), online=None, optim=optim, steps=500)
