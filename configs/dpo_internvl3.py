"""DPO with LoRA on InternVL3 1B to 78B, or 3.5; rates are guesses, not searched."""

from mllm_align import DPO, Config, DataConfig, LoraConfig, MeshConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=DPO(beta=0.1),
        lora=LoraConfig(rank=128, alpha=256.0),
        optim=OptimConfig(learning_rate=1e-6, projector_learning_rate=2e-6),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=32,
        epochs=3,
    )
