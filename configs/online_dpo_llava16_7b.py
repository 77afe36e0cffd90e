"""Online-DPO on LLaVA 1.6-7B; a larger judge by --online.annotator.model FOLDER, else its own base."""

import dataclasses

from mllm_align import Config, JudgeModel, OnlinePairs, SamplingConfig, load_config


def get_config() -> Config:
    base = load_config(__file__.replace("online_dpo", "dpo"))
    online = OnlinePairs(annotator=JudgeModel(), sampling=SamplingConfig(max_tokens=256))
    return dataclasses.replace(base, online=online)
