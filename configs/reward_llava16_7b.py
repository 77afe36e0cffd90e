"""A reward model from LLaVA 1.6-7B, with rate, batch and steps of arXiv 2407.02477."""

from mllm_align import Config, DataConfig, LoraConfig, MeshConfig, OptimConfig, Reward


def get_config() -> Config:
    return Config(
        objective=Reward(),
        lora=LoraConfig(rank=128, alpha=256.0),
        optim=OptimConfig(learning_rate=2e-5, schedule="constant", warmup=0.03),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=32,
        steps=4000,
    )
