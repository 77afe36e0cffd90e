"""PPO on LLaVA 1.6-7B, with settings of arXiv 2407.02477; --reward RUN, --online.value-model RUN."""

import dataclasses

from mllm_align import PPO, Config, OnlineRewards, OptimConfig, RewardModel, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("ppo", "rloo"))
    return dataclasses.replace(
        base,
        objective=PPO(),
        online=OnlineRewards(annotator=RewardModel(), epochs=4, reward_samples=512),
        optim=OptimConfig(learning_rate=1.41e-5, projector_learning_rate=0.0, schedule="constant"),
        batch_size=32,
        micro_batches=1,
        epochs=3.0,
    )
