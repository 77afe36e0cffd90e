"""DPO with LoRA on SmolVLM 256M to 2.2B, for one device or several; rates are guesses, not searched."""

from mllm_align import DPO, Config, DataConfig, LoraConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=DPO(beta=0.1),
        lora=LoraConfig(rank=32, alpha=64.0),
        optim=OptimConfig(learning_rate=1e-5, projector_learning_rate=2e-6),
        data=DataConfig(multiple=128),
        batch_size=32,
        epochs=3,
    )
