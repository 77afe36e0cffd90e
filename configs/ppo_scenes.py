"""PPO on Scenes, from the quickstart's SFT model: one sample a prompt, rewarded by F1."""

import dataclasses

from mllm_align import PPO, Config, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("ppo", "rloo"))
    assert base.online is not None
    online = dataclasses.replace(base.online, minibatches=2, epochs=2)
    return dataclasses.replace(base, objective=PPO(beta=0.02), online=online)
