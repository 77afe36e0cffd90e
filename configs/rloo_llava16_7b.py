"""RLOO on LLaVA 1.6-7B, with settings of arXiv 2407.02477; --reward RUN, a reward model."""

from mllm_align import (
    RLOO,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    OnlineRewards,
    OptimConfig,
    RewardModel,
)


def get_config() -> Config:
    return Config(
        objective=RLOO(responses=4, beta=0.4),
        online=OnlineRewards(annotator=RewardModel(), reward_samples=512),
        lora=LoraConfig(rank=128, alpha=256.0),
        optim=OptimConfig(learning_rate=3e-4, projector_learning_rate=0.0, schedule="constant"),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=256,
        micro_batches=8,
        epochs=2.0,
    )
