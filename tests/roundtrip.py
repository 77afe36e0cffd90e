"""A stored model's tensors in bfloat16 and two files, read and written again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from mllm_align.models.export import export_merged
from mllm_align.models.huggingface import INDEX, load_params, open_folder


def round_trip(model: Path, out: Path, rename: Callable[[str], str], tied: bool) -> tuple[int, int]:
    """(tensors that were read and written, tensors that were copied) of the stored model under other names,
    tied or not; fails where a file comes back otherwise."""
    (out / "in").mkdir()
    raw = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (out / "in" / "config.json").write_text(json.dumps(raw))
    tensors = {
        rename(name): x.astype(jnp.bfloat16)
        for name, x in load_file(model / "model.safetensors").items()
        if not (tied and name.endswith("lm_head.weight"))
    }
    names, files = list(tensors), {}
    for i, file in enumerate(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
        files |= dict.fromkeys(names[i::2], file)
        save_file({name: tensors[name] for name in names[i::2]}, out / "in" / file, {"format": "pt"})
    (out / "in" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    folder = open_folder(out / "in")
    assert folder.config.decoder.tied == tied
    told = export_merged(folder, out / "out", {"params": load_params(folder, np.float32)}, 1.0)
    for file in set(files.values()):
        assert (out / "out" / file).read_bytes() == (out / "in" / file).read_bytes()
    assert told["replaced"] + told["copied"] == len(tensors)
    return told["replaced"], told["copied"]
