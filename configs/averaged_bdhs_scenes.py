"""The averaged loss on Scenes (Eq. 5): the data's rejected response, and one by online BDHS."""

import dataclasses

from mllm_align import DPO, Averaged, Config, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("averaged", "online"))
    return dataclasses.replace(base, objective=Averaged(pair=DPO(beta=0.3), gamma=0.5))
