"""Online BDHS on Scenes: in every step the policy rewrites captions without quite seeing the image."""

from mllm_align import DPO, Config, DataConfig, OnlineBDHS, OptimConfig, SamplingConfig


def get_config() -> Config:
    return Config(
        objective=DPO(beta=0.3),
        online=OnlineBDHS(similarity="lexical", sentence_tokens=32, sampling=SamplingConfig(max_tokens=96)),
        lora=None,
        optim=OptimConfig(learning_rate=3e-4, warmup=0.05),
        data=DataConfig(shapes=1, multiple=8, threads=2),
        batch_size=32,
        steps=120,
        remat="none",
    )
