"""`mllm-align configs`."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from mllm_align.config import named_configs

VERB_OF = {"Config": "train", "BDHSConfig": "bdhs", "JudgeConfig": "judge"}


@dataclass(frozen=True)
class Configs:
    """The configs that come with the program, by the names that train, bdhs, judge and plan take."""

    def __call__(self) -> None:
        configs = named_configs()
        width = max(map(len, configs))
        for name, file in configs.items():
            module = ast.parse(file.read_text(encoding="utf-8"))
            made = next(each.returns for each in module.body if isinstance(each, ast.FunctionDef))
            verb = VERB_OF[ast.unparse(made)] if made else ""
            print(f"{name:{width}}  {verb:5}  {ast.get_docstring(module)}")
        print(f"\nTheir files, to copy and change: {next(iter(configs.values())).parent}")
