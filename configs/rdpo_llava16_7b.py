"""rDPO with LoRA on LLaVA 1.6-7B, with the released settings of Re-Align (arXiv 2502.13146)."""

from mllm_align import RDPO, Config, DataConfig, LoraConfig, MeshConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=RDPO(beta=0.1),
        lora=LoraConfig(rank=128, alpha=256.0, targets=("q", "k", "v", "o")),
        optim=OptimConfig(learning_rate=1e-6, projector_learning_rate=0.0, schedule="cosine", warmup=0.03),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=32,
        epochs=3,
    )
