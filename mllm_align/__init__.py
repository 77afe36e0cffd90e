"""Preference alignment of multimodal LLMs (LLaVA family) in JAX.

    import mllm_align

    bundle = mllm_align.load("path/to/llava")                       # a Hugging Face folder
    scores = mllm_align.score(bundle, "pairs.jsonl")                # or rows: dicts with PIL images
    aligned = mllm_align.train(mllm_align.Config(), bundle, "pairs.jsonl", "runs/dpo")
    mllm_align.export("runs/dpo", "aligned_folder")

Names are loaded when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

from etils import epy

with epy.lazy_api_imports(globals()):
    from mllm_align.align.contract import Objective, Signals, Terms
    from mllm_align.align.pairwise import DPO, IPO, Averaged, RobustDPO, SLiC
    from mllm_align.align.sft import SFT
    from mllm_align.config import (
        BDHSConfig,
        Config,
        DataConfig,
        Distorted,
        Endpoint,
        JudgeConfig,
        JudgeModel,
        LoraConfig,
        MeshConfig,
        OnlineBDHS,
        OnlinePairs,
        OptimConfig,
        SamplingConfig,
        SceneOracle,
        SceneQuestions,
        Scorer,
        load_config,
    )
    from mllm_align.errors import InputError
    from mllm_align.generate.bdhs_job import bdhs
    from mllm_align.models.bundle import Bundle, load
    from mllm_align.training.loop import train
    from mllm_align.training.run_folder import export_run as export
    from mllm_align.training.run_folder import load_run
    from mllm_align.training.score import score

__all__ = [
    "DPO",
    "IPO",
    "SFT",
    "Averaged",
    "BDHSConfig",
    "Bundle",
    "Config",
    "DataConfig",
    "Distorted",
    "Endpoint",
    "InputError",
    "JudgeConfig",
    "JudgeModel",
    "LoraConfig",
    "MeshConfig",
    "Objective",
    "OnlineBDHS",
    "OnlinePairs",
    "OptimConfig",
    "RobustDPO",
    "SLiC",
    "SamplingConfig",
    "SceneOracle",
    "SceneQuestions",
    "Scorer",
    "Signals",
    "Terms",
    "bdhs",
    "export",
    "load",
    "load_config",
    "load_run",
    "score",
    "train",
]
