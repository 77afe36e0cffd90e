"""MPO on LLaVA 1.6-7B, with rate, batch, schedule and decay of the released script of arXiv 2411.10442."""

from mllm_align import BCO, DPO, SFT, Config, DataConfig, MeshConfig, OptimConfig, Part, Sum


def get_config() -> Config:
    return Config(
        objective=Sum((Part(DPO(), 0.8), Part(BCO(), 0.2), Part(SFT(), 1.0))),
        lora=None,
        freeze=(),
        optim=OptimConfig(learning_rate=5e-6, schedule="cosine", warmup=0.03, weight_decay=0.05),
        data=DataConfig(multiple=128),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=256,
        micro_batches=8,
        epochs=1,
    )
