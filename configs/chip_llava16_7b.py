"""CHiP on LLaVA 1.6-7B, with the released settings of arXiv 2501.16629."""

from mllm_align import CHiP, Config, DataConfig, MeshConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=CHiP(beta=0.1, alpha=0.1, segment_weight=4.0),
        lora=None,
        optim=OptimConfig(learning_rate=5e-7, schedule="cosine", warmup=0.03, clip=20.0),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=32,
        epochs=1,
    )
