"""Every setting of a run: one tree of frozen dataclasses, checked where it is built.

A config file is Python with `get_config() -> Config` (or the config of another verb), or YAML with the
fields that differ from `base`. The command line may override any field (`--optim.learning-rate 1e-6`).
"""

from mllm_align.align.contract import OBJECTIVES
from mllm_align.config.annotators import ANNOTATORS, AnnotatorConfig, JudgeConfig
from mllm_align.config.bdhs import BDHSConfig, BDHSMethod
from mllm_align.config.files import (
    from_json,
    load_config,
    named_configs,
    part_files,
    save_json,
    save_yaml,
    to_json,
)
from mllm_align.config.online import ONLINE, Distorted, Online, OnlineBDHS, OnlinePairs, OnlineRewards
from mllm_align.config.parts import (
    LORA_TARGETS,
    DataConfig,
    DistributedConfig,
    Dtype,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    SamplingConfig,
)
from mllm_align.config.train import PARTS, TRACKERS, Config, Remat

__all__ = [
    "ANNOTATORS",
    "LORA_TARGETS",
    "OBJECTIVES",
    "ONLINE",
    "PARTS",
    "TRACKERS",
    "AnnotatorConfig",
    "BDHSConfig",
    "BDHSMethod",
    "Config",
    "DataConfig",
    "Distorted",
    "DistributedConfig",
    "Dtype",
    "JudgeConfig",
    "LoraConfig",
    "MeshConfig",
    "Online",
    "OnlineBDHS",
    "OnlinePairs",
    "OnlineRewards",
    "OptimConfig",
    "Remat",
    "SamplingConfig",
    "from_json",
    "load_config",
    "named_configs",
    "part_files",
    "save_json",
    "save_yaml",
    "to_json",
]
