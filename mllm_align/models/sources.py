"""Where a model comes from: a folder, a PEFT adapter beside its base, or a name in the local Hub cache."""

from __future__ import annotations

import re
from pathlib import Path

from mllm_align.errors import InputError, one_line, quoted, refusal
from mllm_align.models.adapter import CONFIG as ADAPTER
from mllm_align.models.adapter import Adapter, base_name
from mllm_align.models.config import ModelConfig
from mllm_align.models.families.registry import presets, read_config
from mllm_align.models.huggingface import INDEX, Folder, open_folder

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of a repository on the Hub: owner/name


def open_model(model: str | Path) -> Folder:
    """The folder of a model, checked, with what an adapter trained over it.

    model: a Hugging Face folder of a known family, a PEFT adapter folder, or the name of either in the
    local Hub cache; nothing is ever downloaded. Raises InputError for what is none of them, or can't be
    used.
    """
    path = local(model)
    if not is_adapter(path):
        return open_folder(path)
    adapter = Adapter(path, open_folder(base_of(path)))
    return adapter.folder


def config_of(model: str | Path) -> ModelConfig:
    """The configuration alone, of a published model by its short name (`families.registry.presets`) or of
    what `open_model` takes; weights need not be there. Raises InputError where it is neither."""
    name = str(model)
    if (published := presets()).get(name):
        return published[name]
    if not Path(model).is_dir() and "/" not in name:
        raise InputError(f"model {name!r} is no folder and none of {', '.join(published)}")
    path = local(model)
    return read_config(base_of(path) if is_adapter(path) else path)


def local(model: str | Path) -> Path:
    """The folder that a path, or a name in the Hub cache, stands for."""
    path, name = Path(model), str(model)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        raise refusal(
            f"model {quoted(name)}", f"is no path ({one_line(error)})", "name a folder"
        ) from error
    if there or not NAME.fullmatch(name):
        if (path / "run.json").is_file():
            raise refusal(name, "this is a run folder", "export it first, and name what comes out")
        return path
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # the library raises many kinds: each means that it is not there
        raise InputError(
            f"{name} is no folder, and the Hub cache {constants.HF_HUB_CACHE} has no such model; "
            f"download it (hf download {name}), or name a folder"
        ) from error


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    whole = any((path / name).exists() for name in ("model.safetensors", INDEX))
    return (path / ADAPTER).is_file() and not whole


def base_of(adapter: Path) -> Path:
    """The folder that an adapter was trained on: where its configuration says, from the adapter's folder
    or the one around it, or in the Hub cache."""
    name = base_name(adapter)
    for root in (adapter, adapter.parent):
        if (root / name / "config.json").is_file():
            return root / name
    if NAME.fullmatch(name):
        return local(name)
    problem = f"base_model_name_or_path is {quoted(name)}, and no model folder is there"
    raise refusal(str(adapter / ADAPTER), problem, "put the base there, or write its path into the file")
