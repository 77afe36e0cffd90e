"""Temporary alias; being renamed to mllm_align.training."""
import importlib, sys
for _m in ("policy", "step", "optim", "flops", "metrics", "score", "checkpoint", "run", "loop"):
    try: sys.modules[f"mllm_align.train.{_m}"] = importlib.import_module(f"mllm_align.training.{_m}")
    except ImportError: pass
