"""The model families by config.json's model_type, and the configuration of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_align.errors import InputError, one_line, refusal
from mllm_align.files import read_json
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.base import ModelFamily
from mllm_align.models.families.gemma3.family import Gemma3
from mllm_align.models.families.idefics3.family import Idefics3
from mllm_align.models.families.internvl.family import InternVL
from mllm_align.models.families.llava.family import Llava, LlavaNext
from mllm_align.models.families.onevision.family import OneVision
from mllm_align.models.families.qwen2_5_vl.family import Qwen25VL
from mllm_align.models.families.qwen3_vl.family import Qwen3VL
from mllm_align.registry import Registry

SUCH = "such as llava-hf/llava-1.5-7b-hf, with all its files"

FAMILIES = Registry("model family")
FAMILIES.register("llava")(Llava())
FAMILIES.register("llava_next")(LlavaNext())
FAMILIES.register("llava_onevision")(OneVision())
FAMILIES.register("idefics3")(Idefics3())
FAMILIES.register("smolvlm")(Idefics3())
FAMILIES.register("qwen2_5_vl")(Qwen25VL())
FAMILIES.register("qwen3_vl")(Qwen3VL())
FAMILIES.register("gemma3")(Gemma3())
FAMILIES.register("internvl")(InternVL())


def family_of(config: ModelConfig) -> ModelFamily[Any]:
    return FAMILIES[config.family]


def presets() -> dict[str, ModelConfig]:
    """The published models of all families by name."""
    return {name: config for family in FAMILIES.values() for name, config in family.presets.items()}


def read_config(path: str | Path) -> ModelConfig:
    """What a folder's config.json says; weights need not be there.

    Raises InputError where it is missing, is of no family that is computed here, or has a value that is
    out of range or asks for what is not computed.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        problem = "this is no Hugging Face model folder: it has no config.json"
        raise refusal(str(path), problem, f"give the path of a folder {SUCH}")
    return parse_config(path, read_json(path / "config.json", f"give the path of a folder {SUCH}"))


def parse_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    """raw: the value of config.json. Raises InputError as `read_config`."""
    for family in FAMILIES.values():
        if (what := family.foreign(raw)) is not None:
            raise InputError(f"{path} {what}")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = " or ".join(map(repr, FAMILIES))
        problem = (
            f"is of no family that is computed here: config.json has model_type {one_line(repr(kind))}"
        )
        raise InputError(one_line(f"{path} {problem}, wanted {known}", 2000))
    return FAMILIES[kind].config(path, raw)
