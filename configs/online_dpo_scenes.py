"""Online-DPO on Scenes, from the quickstart's SFT model: two samples a prompt, ranked by exact counting."""

import dataclasses

from mllm_align import Config, OnlinePairs, SamplingConfig, SceneOracle, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("online_dpo", "online_bdhs"))
    sampling = SamplingConfig(temperature=1.0, max_tokens=96)
    return dataclasses.replace(base, online=OnlinePairs(annotator=SceneOracle(), sampling=sampling))
