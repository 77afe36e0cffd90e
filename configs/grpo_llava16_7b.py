"""GRPO on LLaVA 1.6-7B; --reward RUN, a reward model."""

import dataclasses

from mllm_align import GRPO, Config, OnlineRewards, OptimConfig, RewardModel, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("grpo", "rloo"))
    optim = OptimConfig(learning_rate=1e-6, projector_learning_rate=0.0, schedule="constant")
    return dataclasses.replace(
        base,
        objective=GRPO(responses=8),
        online=OnlineRewards(annotator=RewardModel()),
        optim=optim,
        batch_size=128,
        micro_batches=4,
    )
