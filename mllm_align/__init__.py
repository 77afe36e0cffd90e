"""Preference alignment of multimodal LLMs in JAX.

    import mllm_align

    bundle = mllm_align.load("path/to/llava")                       # a Hugging Face folder
    print(mllm_align.generate(bundle, rows))                        # rows: dicts with prompts and images
    scores = mllm_align.score(bundle, "pairs.jsonl")
    aligned = mllm_align.train(mllm_align.Config(), bundle, "pairs.jsonl", "runs/dpo")
    mllm_align.export("runs/dpo", "aligned_folder")

`model` and `data` of every call may be a path as well as an object: a model's or a run's folder, a data
file. Names are loaded when they are first used, so that importing the package is cheap.
"""

from __future__ import annotations

from etils import epy

with epy.lazy_api_imports(globals()):
    from mllm_align.align.absolute import APO, BCO, KTO
    from mllm_align.align.contract import Objective, Signals, Terms
    from mllm_align.align.multi_reference import MRPO
    from mllm_align.align.pairwise import DPO, EXO, IPO, Averaged, RobustDPO, SLiC
    from mllm_align.align.policy_gradient import GRPO, PPO, RLOO
    from mllm_align.align.reference_free import CPO, ORPO, SimPO
    from mllm_align.align.reward import Reward
    from mllm_align.align.sft import SFT
    from mllm_align.align.visual import MDPO, RDPO, CHiP, Visual
    from mllm_align.align.weighted import Part, Sum
    from mllm_align.annotate.endpoint import Endpoint
    from mllm_align.annotate.judge import JudgeModel
    from mllm_align.annotate.reward import RewardModel
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
        OnlineRewards,
        OptimConfig,
        SamplingConfig,
        load_config,
    )
    from mllm_align.data.mixture import Mixture
    from mllm_align.errors import InputError
    from mllm_align.evaluation.accuracy import judge
    from mllm_align.evaluation.base import Evaluator, Item, Scored
    from mllm_align.evaluation.run import evaluate
    from mllm_align.generation.bdhs_job import bdhs
    from mllm_align.generation.respond import generate
    from mllm_align.models.bundle import Bundle, load
    from mllm_align.testbed.annotators import SceneOracle, SceneQuestions
    from mllm_align.training.callbacks import Callback
    from mllm_align.training.loop import train
    from mllm_align.training.run_model import export_run as export
    from mllm_align.training.run_model import load_run
    from mllm_align.training.score import score

__all__ = [
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "GRPO",
    "IPO",
    "KTO",
    "MDPO",
    "MRPO",
    "ORPO",
    "PPO",
    "RDPO",
    "RLOO",
    "SFT",
    "AnnotatorConfig",
    "Averaged",
    "BDHSConfig",
    "Bundle",
    "CHiP",
    "Callback",
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
    "Mixture",
    "Objective",
    "OnlineBDHS",
    "OnlinePairs",
    "OnlineRewards",
    "OptimConfig",
    "Part",
    "Question",
    "Reward",
    "RewardModel",
    "RobustDPO",
    "SLiC",
    "SamplingConfig",
    "SceneOracle",
    "SceneQuestions",
    "Scored",
    "Scorer",
    "Signals",
    "SimPO",
    "Sum",
    "Terms",
    "Verdict",
    "Visual",
    "bdhs",
    "evaluate",
    "export",
    "generate",
    "judge",
    "load",
    "load_config",
    "load_run",
    "score",
    "scored",
    "train",
]


def __dir__() -> list[str]:
    return __all__
