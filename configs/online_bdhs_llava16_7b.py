"""Online BDHS on LLaVA 1.6-7B with the paper's settings; mpnet similarity, no annotator."""

import dataclasses

from mllm_align import Config, OnlineBDHS, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("online_bdhs", "dpo"))
    return dataclasses.replace(base, online=OnlineBDHS())
