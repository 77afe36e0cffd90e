"""Mixed-DPO on Scenes (arXiv 2407.02477, Eq. 4): half of the examples keep the pair of the data."""

import dataclasses

from mllm_align import Config, OnlinePairs, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("mixed", "online"))
    assert isinstance(base.online, OnlinePairs)
    return dataclasses.replace(base, online=dataclasses.replace(base.online, offline_share=0.5))
