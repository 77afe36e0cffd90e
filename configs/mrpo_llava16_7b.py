"""MRPO with LoRA on LLaVA 1.6-7B, with the released settings; give --objective.references A B."""

from mllm_align import MRPO, Config, DataConfig, LoraConfig, MeshConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=MRPO(beta=0.1, clip=0.1),
        lora=LoraConfig(rank=8, alpha=16.0, targets=("q", "v")),
        optim=OptimConfig(learning_rate=1e-5, projector_learning_rate=0.0, schedule="cosine", warmup=0.0),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=8,
        epochs=1,
    )
