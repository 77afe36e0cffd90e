"""mDPO on Scenes, from the quickstart's SFT model and pairs."""

import dataclasses

from mllm_align import MDPO, Config, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("mdpo", "online_bdhs"))
    return dataclasses.replace(base, objective=MDPO(beta=0.3), online=None)
