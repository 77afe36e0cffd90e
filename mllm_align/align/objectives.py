"""All objectives by name: every module of this folder registers its own."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from mllm_align import align
from mllm_align.align.contract import OBJECTIVES, Objective

for _module in pkgutil.iter_modules(align.__path__, f"{align.__name__}."):
    if _module.name != __name__:
        import_module(_module.name)

__all__ = ["OBJECTIVES", "Objective"]
