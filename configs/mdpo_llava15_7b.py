"""mDPO with LoRA on LLaVA 1.5-7B, with the released settings of arXiv 2406.11839."""

from mllm_align import MDPO, Config, DataConfig, LoraConfig, MeshConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=MDPO(beta=0.1),
        lora=LoraConfig(rank=64, alpha=128.0),
        optim=OptimConfig(learning_rate=1e-5, schedule="cosine", warmup=0.1, weight_decay=0.05, b2=0.98),
        data=DataConfig(multiple=64),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=32,
        epochs=3,
    )
