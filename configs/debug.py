"""DPO with LoRA, small, on one GPU: to see why a run fails (--debug-nans) or is slow (--profile N)."""

from mllm_align import DPO, Config, DataConfig, LoraConfig, OptimConfig


def get_config() -> Config:
    return Config(
        objective=DPO(beta=0.1),
        lora=LoraConfig(rank=16, alpha=32.0),
        optim=OptimConfig(learning_rate=5e-7, projector_learning_rate=2e-6),
        data=DataConfig(multiple=128, shapes=1),
        batch_size=2,
        micro_batches=2,
        steps=10,
        log_every=1,
    )
