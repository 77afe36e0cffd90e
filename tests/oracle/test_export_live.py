"""transformers and PEFT compute from an export what JAX computes from the trained trees."""

import json
import shutil
from functools import cache

import jax
import numpy as np
import pytest
from goldens import FIXTURES, goldens, responses
from interpreter import needs, run

from mllm_align.models.export import export_adapter, export_merged
from mllm_align.models.huggingface import load_params, open_folder
from mllm_align.models.lora import init_lora
from mllm_align.models.policy import policy_variables
from mllm_align.models.sources import open_model

RANK, ALPHA = 4, 8
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module", autouse=True)
def oracle():
    needs("torch", "peft", "transformers")


@pytest.fixture
def golden(request):
    return goldens(request.param)


@pytest.fixture
def trained(golden):
    """Every map of the decoder and the projector moved far enough to change the numbers visibly."""
    rng = np.random.default_rng(0)

    def noise(like):
        return (0.05 * rng.standard_normal(like.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_lora(golden.config.decoder, RANK, TARGETS, jax.random.key(0)))
    projector = jax.tree.map(lambda x: x + noise(x), golden.base["projector"])
    return {"params": {"projector": projector}, "lora": jax.tree.map(noise, shapes)}


def peer(name, folder, out, adapter=None, dtype="float32"):
    """Log-probs of the stored batch by transformers, one array a response; modules PEFT replaced."""
    asked = ["--folder", folder, "--data", FIXTURES / "pairs.jsonl", "--ids", FIXTURES / f"{name}.npz"]
    asked += ["--out", out, "--dtype", dtype, *(["--adapter", adapter] if adapter else [])]
    run("check_export.py", *asked)
    with np.load(out) as scores:
        return goldens(name).rows(scores["per_token_logps"][:, :-1]), list(scores["modules_to_save"])


@cache
def compiled(name):
    """One function for all tests of a model."""
    return jax.jit(goldens(name).model.apply)


def jax_logps(golden, variables):
    batch = golden.batch()
    logps = compiled(golden.folder.path.name)(variables, batch)[0]
    return responses(np.asarray(logps), np.asarray(batch.responses.mask))


def furthest(left, right):
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


# Names of weights, and of modules, that are unlike each other; test_train_export_live.py has all families.
UNLIKE = ["llavanext", "idefics3", "qwen3_vl"]


@pytest.mark.parametrize("golden", UNLIKE, indirect=True)
def test_merged_folder_and_adapter_mean_what_was_trained(golden, trained, tmp_path):
    name, folder = golden.folder.path.name, golden.folder
    export_merged(folder, tmp_path / "merged", trained, ALPHA / RANK)
    export_adapter(folder, tmp_path / "adapter", trained, RANK, ALPHA, TARGETS)
    merged, _ = peer(name, tmp_path / "merged", tmp_path / "merged.npz")
    adapter, saved = peer(name, folder.path, tmp_path / "adapter.npz", tmp_path / "adapter")
    ours = jax_logps(golden, policy_variables(golden.base, trained, ALPHA / RANK, np.float32))
    base = jax_logps(golden, {"params": golden.base})
    figures = {
        "merged - jax": furthest(merged, ours),
        "adapter - jax": furthest(adapter, ours),
        "merged - adapter": furthest(merged, adapter),
        "trained - base": furthest(ours, base),
    }
    print(name, json.dumps(figures))
    assert len(saved) == 1 and saved[0].endswith(golden.folder.family.modules["projector"])
    assert figures.pop("trained - base") > 0.1
    assert max(figures.values()) < 2e-5, figures


@pytest.mark.parametrize("golden", UNLIKE, indirect=True)
def test_recast_folder_loads(golden, trained, tmp_path):
    """Read back in float32 by both: the rounding is in the folder, not in the arithmetic."""
    out, name = tmp_path / "merged", golden.folder.path.name
    told = export_merged(golden.folder, out, trained, ALPHA / RANK, "bfloat16")
    theirs, _ = peer(name, out, tmp_path / "out.npz")
    ours = jax_logps(golden, {"params": load_params(open_folder(out), np.float32)})
    assert told["dtype"] == "bfloat16"
    assert furthest(theirs, ours) < 2e-5


@pytest.mark.parametrize("golden", UNLIKE, indirect=True)
def test_adapter_without_projector_leaves_it_alone(golden, trained, tmp_path):
    name, lora = golden.folder.path.name, {"lora": trained["lora"]}
    export_adapter(golden.folder, tmp_path / "adapter", lora, RANK, ALPHA, TARGETS)
    theirs, saved = peer(name, golden.folder.path, tmp_path / "out.npz", tmp_path / "adapter")
    ours = jax_logps(golden, policy_variables(golden.base, lora, ALPHA / RANK, np.float32))
    assert not saved
    assert furthest(theirs, ours) < 2e-5


@pytest.mark.parametrize(
    "golden, whole, text",
    [
        ("llavanext", True, None),
        ("llavanext", None, True),
        *((name, True, True) for name in UNLIKE),
    ],
    indirect=["golden"],
)
def test_flags_of_a_tied_head_leave_the_stored_one(golden, whole, text, tmp_path):
    name, folder = golden.folder.path.name, tmp_path / "flagged"
    shutil.copytree(golden.folder.path, folder)
    raw = json.loads((folder / "config.json").read_text())
    for part, flag in ((raw, whole), (raw["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        part.update({} if flag is None else {"tie_word_embeddings": flag})
    (folder / "config.json").write_text(json.dumps(raw))
    theirs, _ = peer(name, folder, tmp_path / "out.npz")
    ours = jax_logps(golden, {"params": load_params(open_folder(folder), np.float32)})
    assert furthest(theirs, ours) < 2e-5


SETTINGS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 9}},
    "all linear maps": {"target_modules": "all-linear", "modules_to_save": None},
}


@pytest.mark.parametrize(
    "golden, settings",
    [
        *(("llavanext", name) for name in SETTINGS),
        *((name, "all linear maps") for name in ("onevision", "idefics3", "qwen3_vl")),
    ],
    indirect=["golden"],
)
def test_an_adapter_that_peft_wrote(golden, settings, tmp_path):
    name, adapter = golden.folder.path.name, tmp_path / "adapter"
    asked = ["--folder", golden.folder.path, "--out", adapter, "--settings", json.dumps(SETTINGS[settings])]
    run("make_adapter.py", *asked)
    theirs, _ = peer(name, golden.folder.path, tmp_path / "out.npz", adapter)
    ours = jax_logps(golden, {"params": load_params(open_model(adapter), np.float32)})
    base = jax_logps(golden, {"params": golden.base})
    print(name, settings, furthest(theirs, ours), furthest(base, ours))
    assert furthest(base, ours) > 0.1
    assert furthest(theirs, ours) < 2e-5
