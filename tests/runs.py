"""Small runs on the stored LLaVA 1.5: what the tests of training and of the command line share.

Tracing and compiling take nearly all of their time. So modules that train take `compiling` in: programs
are optimized little, runs of the same settings share theirs, and one that was compiled before comes from a
cache that all processes of a session share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from goldens import FIXTURES
from kept_programs import KEPT

from mllm_align.align.reward import Reward
from mllm_align.config import Config, DataConfig, LoraConfig, MeshConfig, OptimConfig
from mllm_align.models.bundle import Bundle, load
from mllm_align.prepare import prepare
from mllm_align.sharding import make_mesh
from mllm_align.training import loop
from mllm_align.training.callbacks import Callback
from mllm_align.training.loop import train
from mllm_align.training.programs import train_program

MODEL, PAIRS = FIXTURES / "llava15", FIXTURES / "pairs.jsonl"

TINY = Config(
    lora=LoraConfig(rank=2, alpha=4.0),
    optim=OptimConfig(learning_rate=1e-2, schedule="constant", warmup=0.0),
    data=DataConfig(shapes=1),
    batch_size=4,
    steps=4,
    remat="none",
    log_every=1,
)
FULL = replace(TINY, lora=None, freeze=("vision_tower",))


PROGRAMS: dict[Any, Any] = {}


def shared_program(config: Config, **sizes: Any):
    """`train_program`, made and traced once for all runs whose steps are the same. That another process
    makes the same of it is shown by the jobs (`*_jobs.py`)."""
    c = config
    if c.optim.schedule == "constant" and not c.optim.warmup:
        sizes |= {"steps": 1, "warmup": None}
    own = c.objective, c.lora, c.freeze, c.live_reference, c.optim, c.dtype, c.remat
    key = own, tuple(sizes.items())
    if jax.config.values["jax_debug_nans"]:  # looks at what is traced under it
        return train_program(config, **sizes)
    try:
        if key not in PROGRAMS:
            PROGRAMS[key] = train_program(config, **sizes)
        return PROGRAMS[key]
    except TypeError:  # an objective that has no hash
        return train_program(config, **sizes)


@pytest.fixture(scope="module", autouse=True)
def compiling():
    """Import it into a test module; optax mixes dtypes, so strict promotion is off as for users."""
    settings = {
        "jax_compilation_cache_dir": KEPT["JAX_COMPILATION_CACHE_DIR"],
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_disable_most_optimizations": True,
        "jax_numpy_dtype_promotion": "standard",
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "train_program", shared_program)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


REWARD = replace(TINY, objective=Reward())


@cache
def _trained(out: Path) -> Path:
    train(replace(REWARD, save_every=2), bundle(), PAIRS, out, PAIRS)
    return out


@pytest.fixture(scope="module")
def reward_run(compiling, tmp_path_factory) -> Path:
    """The run of a reward model. Import it into a test module, with `compiling`; all modules share one."""
    return _trained(tmp_path_factory.getbasetemp() / "reward" / "run")


class EachStep(Callback):
    """Calls a function with the figures of every logged step."""

    def __init__(self, do: Callable[[dict[str, Any]], Any]):
        self.on_step = do


def one_device(config: MeshConfig | None = None):
    return make_mesh(MeshConfig(), jax.devices()[:1])


@cache
def bundle() -> Bundle:
    """The stored model on one device, float32."""
    return load(MODEL, "float32", one_device())


def rows(count: int | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in PAIRS.read_text().splitlines()][:count]


def nan_for_one(responses: int) -> tuple[Bundle, str]:
    """(the model with NaN as the embedding of a token, id of the one record that has it): in its prompt, or
    in that and some responses."""
    _, records, _ = prepare(bundle(), PAIRS, TINY.data, responses)
    held = [set(np.concatenate([r.prefix, *r.responses]).tolist()) for r in records]
    index, rare = next(
        (i, min(rest))
        for i, own in enumerate(held)
        if (rest := own - set().union(*held[:i], *held[i + 1 :]))
    )
    decoder = dict(bundle().params["decoder"])
    decoder["embedding"] = decoder["embedding"].at[rare].set(np.nan)
    broken = replace(bundle(), params={**bundle().params, "decoder": decoder})
    return broken, records[index].record.id


def write_pairs(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> Path:
    """A data folder of its own with the stored pictures."""
    shutil.copytree(FIXTURES / "images", folder / "images", dirs_exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of a run's log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in events(out, "train")]


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def same(left, right) -> bool:
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    return all(np.array_equal(left[name], right[name]) for name in left)
