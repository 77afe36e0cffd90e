"""DPO with LoRA on a small model: for a CPU, for trying things out."""

from mllm_align import DPO, Config, DataConfig, LoraConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=DPO(beta=0.1),
        lora=LoraConfig(rank=8, alpha=16.0),
        optim=OptimConfig(learning_rate=2e-3, projector_learning_rate=1e-3, schedule="constant"),
        data=DataConfig(shapes=2),  # steps are short beside a compilation
        batch_size=8,
        epochs=2,
        remat="none",
        log_every=5,
    )
