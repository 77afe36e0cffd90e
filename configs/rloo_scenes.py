"""RLOO on Scenes, from the quickstart's SFT model: four samples a prompt, rewarded by F1."""

import dataclasses

from mllm_align import RLOO, Config, OnlineRewards, SamplingConfig, SceneOracle, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("rloo", "online_bdhs"))
    sampling = SamplingConfig(temperature=1.0, max_tokens=96)
    return dataclasses.replace(
        base,
        objective=RLOO(responses=4, beta=0.02),
        optim=dataclasses.replace(base.optim, learning_rate=6e-4),
        online=OnlineRewards(annotator=SceneOracle(order="f1"), sampling=sampling, reward_samples=512),
    )
