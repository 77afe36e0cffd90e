"""How good a judge is: another LLaVA with `--annotator.model FOLDER`; without, the policy's own base."""

from mllm_align.config import JudgeConfig, MeshConfig


def get_config() -> JudgeConfig:
    return JudgeConfig(mesh=MeshConfig(data=1, fsdp=-1))
