"""Preference alignment of multimodal LLMs (LLaVA family) in JAX.

    import mllm_align

    bundle = mllm_align.load("path/to/llava")                       # a Hugging Face folder
    scores = mllm_align.score(bundle, "pairs.jsonl")                # or rows: dicts with PIL images
    aligned = mllm_align.train(mllm_align.Config(), bundle, "pairs.jsonl", "runs/dpo")
    mllm_align.export("runs/dpo", "aligned_folder")

Names are loaded when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_align.align.contract import Objective, Signals, Terms
    from mllm_align.align.pairwise import DPO, IPO, Averaged, RobustDPO, SLiC
    from mllm_align.align.sft import SFT
    from mllm_align.annotate.endpoint import Endpoint
    from mllm_align.annotate.judge import JudgeModel
    from mllm_align.annotate.scorer import Scorer
    from mllm_align.annotate.verdict import Question, Verdict, scored
    from mllm_align.config import (
        AnnotatorConfig,
        BDHSConfig,
        Config,
        DataConfig,
        Distorted,
        JudgeConfig,
        LoraConfig,
        MeshConfig,
        OnlineBDHS,
        OnlinePairs,
        OptimConfig,
        SamplingConfig,
        load_config,
    )
    from mllm_align.errors import InputError
    from mllm_align.evaluation.base import Evaluator, Item, Scored
    from mllm_align.evaluation.run import evaluate
    from mllm_align.generate.bdhs_job import bdhs
    from mllm_align.models.bundle import Bundle, load
    from mllm_align.testbed.annotators import SceneOracle, SceneQuestions
    from mllm_align.training.loop import train
    from mllm_align.training.run_folder import export_run as export
    from mllm_align.training.run_folder import load_run
    from mllm_align.training.score import score

_HOME = {
    "AnnotatorConfig": "config",
    "Averaged": "align.pairwise",
    "BDHSConfig": "config",
    "Bundle": "models.bundle",
    "Config": "config",
    "DPO": "align.pairwise",
    "DataConfig": "config",
    "Distorted": "config",
    "Endpoint": "annotate.endpoint",
    "Evaluator": "evaluation.base",
    "IPO": "align.pairwise",
    "InputError": "errors",
    "Item": "evaluation.base",
    "JudgeConfig": "config",
    "JudgeModel": "annotate.judge",
    "LoraConfig": "config",
    "MeshConfig": "config",
    "Objective": "align.contract",
    "OnlineBDHS": "config",
    "OnlinePairs": "config",
    "OptimConfig": "config",
    "Question": "annotate.verdict",
    "RobustDPO": "align.pairwise",
    "SFT": "align.sft",
    "SLiC": "align.pairwise",
    "SamplingConfig": "config",
    "SceneOracle": "testbed.annotators",
    "SceneQuestions": "testbed.annotators",
    "Scored": "evaluation.base",
    "Scorer": "annotate.scorer",
    "Signals": "align.contract",
    "Terms": "align.contract",
    "Verdict": "annotate.verdict",
    "bdhs": "generate.bdhs_job",
    "evaluate": "evaluation.run",
    "export": "training.run_folder:export_run",
    "load": "models.bundle",
    "load_config": "config",
    "load_run": "training.run_folder",
    "score": "training.score",
    "scored": "annotate.verdict",
    "train": "training.loop",
}

__all__ = [
    "DPO",
    "IPO",
    "SFT",
    "AnnotatorConfig",
    "Averaged",
    "BDHSConfig",
    "Bundle",
    "Config",
    "DataConfig",
    "Distorted",
    "Endpoint",
    "Evaluator",
    "InputError",
    "Item",
    "JudgeConfig",
    "JudgeModel",
    "LoraConfig",
    "MeshConfig",
    "Objective",
    "OnlineBDHS",
    "OnlinePairs",
    "OptimConfig",
    "Question",
    "RobustDPO",
    "SLiC",
    "SamplingConfig",
    "SceneOracle",
    "SceneQuestions",
    "Scored",
    "Scorer",
    "Signals",
    "Terms",
    "Verdict",
    "bdhs",
    "evaluate",
    "export",
    "load",
    "load_config",
    "load_run",
    "score",
    "scored",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOME[name].partition(":")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), there or name)
    globals()[name] = value
    return value
