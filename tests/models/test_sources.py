"""Models that are no plain folder: PEFT adapters beside their base, and names in the local Hub cache."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from goldens import FIXTURES
from huggingface_hub import constants
from refusals import assert_refusal
from safetensors.numpy import load_file, save_file

from mllm_align.cli import main
from mllm_align.errors import InputError
from mllm_align.models.changes import Trained
from mllm_align.models.export import export_adapter, export_merged
from mllm_align.models.families.llava.family import Llava
from mllm_align.models.huggingface import Reader, load_params, open_folder
from mllm_align.models.lora import init_lora
from mllm_align.models.sources import config_of, open_model

RANK, ALPHA, TARGETS = 3, 6.0, ("q", "down")
BASE = FIXTURES / "llavanext"


def trained(seed=0, rank=RANK, targets=TARGETS, projector=True):
    """Low-rank terms, and a projector moved from where it was."""
    folder, rng = open_folder(BASE), np.random.default_rng(seed)

    def noise(like):
        return (0.05 * rng.standard_normal(like.shape)).astype(np.float32)

    shapes = jax.eval_shape(lambda: init_lora(folder.config.decoder, rank, targets, jax.random.key(0)))
    tree = {"lora": jax.tree.map(noise, shapes)}
    if projector:
        base = load_params(folder, np.float32, only=lambda path: path[0] == "projector")["projector"]
        tree["params"] = {"projector": jax.tree.map(lambda x: np.asarray(x) + noise(x), base)}
    return tree


def tensors(folder):
    """Canonical name -> tensor in float64, as the model is read."""
    read = Reader(folder)
    return {name: read(name).astype(np.float64) for name in folder.stored}


def same_tensors(found, expected, atol=0.0):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.fixture
def adapter(tmp_path):
    """A base and our own export of an adapter beside it."""
    base = shutil.copytree(BASE, tmp_path / "base")
    export_adapter(open_folder(base), tmp_path / "adapter", trained(), RANK, ALPHA, TARGETS)
    return tmp_path / "adapter"


def edit(adapter, **fields):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change(adapter, change):
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def refused(path, *words):
    assert_refusal(lambda: open_model(path), *words)


# ---- what was trained over a folder ----------------------------------------------------------------


def test_a_folder_with_changes_is_what_its_export_would_be(tmp_path):
    first, folder = trained(), open_folder(BASE)
    over = replace(folder, changes=(Trained(folder.config, first, ALPHA / RANK),))
    export_merged(folder, tmp_path / "merged", first, ALPHA / RANK, "float32")
    found = {name: x.astype(np.float32) for name, x in tensors(over).items()}
    same_tensors(found, tensors(open_folder(tmp_path / "merged")))
    assert over.fingerprint != folder.fingerprint
    assert over.projector_fingerprint != folder.projector_fingerprint
    again = replace(folder, changes=(Trained(folder.config, trained(), ALPHA / RANK),))
    assert again.fingerprint == over.fingerprint
    params = load_params(over, np.float32)
    assert np.array_equal(
        params["projector"]["linear_1"]["kernel"], first["params"]["projector"]["linear_1"]["kernel"]
    )


def test_a_second_run_is_rounded_once_with_the_first(tmp_path):
    folder, first, second = open_folder(BASE), trained(0), trained(1, rank=2, targets=("v", "down"))
    over = replace(folder, changes=(Trained(folder.config, first, ALPHA / RANK),))
    told = export_merged(over, tmp_path / "out", second, 0.5, "bfloat16")
    assert told["merged"] == 2 * 3 and told["replaced"] == 4
    exact = tensors(replace(over, changes=(*over.changes, Trained(folder.config, second, 0.5))))
    out = tensors(open_folder(tmp_path / "out"))
    for name, tensor in exact.items():
        rounded = tensor.astype(jax.numpy.bfloat16).astype(np.float64)
        assert np.array_equal(out[name], rounded), name
    export_merged(folder, tmp_path / "one", first, ALPHA / RANK)
    export_merged(open_folder(tmp_path / "one"), tmp_path / "two", second, 0.5)
    same_tensors(exact, tensors(open_folder(tmp_path / "two")), atol=1e-6)


def test_the_adapter_of_a_second_run_holds_both(tmp_path):
    folder, first, second = open_folder(BASE), trained(0), trained(1, 2, ("v", "down"), projector=False)
    over = replace(folder, changes=(Trained(folder.config, first, ALPHA / RANK),))
    told = export_adapter(over, tmp_path / "adapter", second, 2, 5.0, ("v", "down"))
    assert "q_proj|self_attn\\.v_proj|mlp\\.down_proj" in told["target_modules"]
    exact = tensors(replace(over, changes=(*over.changes, Trained(folder.config, second, 2.5))))
    same_tensors(tensors(open_model(tmp_path / "adapter")), exact, atol=1e-7)
    whole = {"params": {"decoder": {"norm": {"scale": np.ones(32, np.float32)}}}}
    over = replace(folder, changes=(Trained(folder.config, whole, 1.0),))
    with pytest.raises(InputError, match=r"language_model\.norm\.weight"):
        export_adapter(over, tmp_path / "other", second, 2, 5.0, ("v", "down"))


# ---- adapters --------------------------------------------------------------------------------------


def test_our_own_adapter_comes_back(adapter):
    folder = open_folder(BASE)
    expected = tensors(replace(folder, changes=(Trained(folder.config, trained(), ALPHA / RANK),)))
    found = open_model(adapter)
    same_tensors(tensors(found), expected)
    assert found.named == adapter and found.path == adapter.parent / "base"
    assert found.fingerprint != folder.fingerprint and config_of(adapter) == folder.config


@pytest.mark.parametrize("name", ["../base", "base"])
def test_a_base_by_a_path_from_the_adapter_or_beside_it(adapter, name):
    edit(adapter, base_model_name_or_path=name)
    assert open_model(adapter).config == open_folder(BASE).config


def test_patterns_and_rank_stabilised_scales(adapter):
    """Rank and alpha of a module: the first pattern that its name ends in."""
    plain = tensors(open_model(adapter))
    base = tensors(open_folder(BASE))
    edit(adapter, use_rslora=True)
    found = tensors(open_model(adapter))
    edit(adapter, use_rslora=False, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12, "q_proj": 3})
    patterned = tensors(open_model(adapter))
    for layer in range(2):
        for theirs in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"language_model.layers.{layer}.{theirs}.weight"
            update = plain[name] - base[name]
            np.testing.assert_allclose(found[name], base[name] + update * 3**0.5, atol=1e-12)
            factor = 1.0 if theirs == "mlp.down_proj" else (12 if layer else 3) / ALPHA
            np.testing.assert_allclose(patterned[name], base[name] + update * factor, atol=1e-12)
    edit(adapter, rank_pattern={"q_proj": 5})
    refused(adapter, "q_proj", "[3, 32]", "[5, 32]")


def test_terms_on_the_vision_tower_and_projector_are_merged_too(adapter):
    rng, base = np.random.default_rng(3), tensors(open_folder(BASE))
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((RANK, 32), (32, RANK)))
    modules = ("vision_tower.encoder.layers.2.self_attn.q_proj", "multi_modal_projector.linear_2")

    def add(stored):
        stored = {name: x for name, x in stored.items() if "multi_modal" not in name}
        for module in modules:
            at = f"base_model.model.model.{module}"
            stored |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        return stored

    change(adapter, add)
    found = tensors(open_model(adapter))
    for module in modules:
        name = Llava().canonical(f"model.{module}.weight")
        exact = base[name] + ALPHA / RANK * b.astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_allclose(found[name], exact, atol=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["x"]},
        {"layer_replication": [[0, 1]]},
        {"r": 0},
        {"r": "8"},
        {"r": 10**9},
        {"lora_alpha": -1},
        {"lora_alpha": float("nan")},
        {"use_rslora": "yes"},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"(": 2}},
        {"base_model_name_or_path": None},
        {"base_model_name_or_path": "/nowhere/at-all"},
    ],
    ids=str,
)
def test_what_an_adapter_may_not_ask_for(adapter, fields):
    edit(adapter, **fields)
    name = next(iter(fields))
    refused(adapter, "adapter_config.json", name)


LANGUAGE = "base_model.model.model.language_model"
LAYER = f"{LANGUAGE}.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "new, words",
    [
        (
            {f"{LAYER}.lora_magnitude_vector": np.ones(64, np.float32)},
            ["lora_magnitude_vector", "merge it"],
        ),
        ({f"{LANGUAGE}.norm.weight": np.ones(32, np.float32)}, ["norm.weight"]),
        (
            {
                "base_model.model.model.language_model.embed_tokens.lora_embedding_A": np.ones(
                    (3, 384), "f4"
                )
            },
            ["lora_embedding_A"],
        ),
        ({f"{LAYER}.lora_A.weight": np.ones((3, 31), np.float32)}, ["q_proj.lora_A", "[3, 31]", "[3, 32]"]),
        ({f"{LAYER}.lora_A.weight": np.full((3, 32), np.nan, "f4")}, ["q_proj.lora_A", "not finite"]),
        ({f"{LAYER}.lora_A.weight": np.ones((3, 32), np.int32)}, ["q_proj.lora_A", "floating"]),
        ({LAYER.replace(".0.", ".7.") + ".lora_A.weight": np.ones((3, 32), "f4")}, ["layers.7", "has not"]),
        ({LAYER.replace("q_", "k_") + ".lora_A.weight": np.ones((3, 32), "f4")}, ["k_proj", "alone"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_tensors_that_an_adapter_may_not_have(adapter, new, words):
    change(adapter, lambda stored: stored | new)
    refused(adapter, "adapter_model.safetensors", *words)


def test_broken_adapter_files(adapter):
    weights, config = (adapter / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    whole = weights.read_bytes(), config.read_bytes()
    for content in (b"", whole[0][:100], b"x" * 50):
        weights.write_bytes(content)
        refused(adapter, "adapter_model.safetensors", "can't be read")
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    refused(adapter, "pickled", "safe_serialization")
    weights.write_bytes(whole[0])
    for content in (b"{", b"[]", b'{"a":' * 2000):
        config.write_bytes(content)
        refused(adapter, "adapter_config.json")


# ---- names -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub cache with one model in it, as huggingface_hub lays it out."""
    cache, commit = tmp_path / "hub", "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    place = cache / "models--someone--tiny-llava"
    shutil.copytree(BASE, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    return place / "snapshots" / commit


def test_a_name_in_the_hub_cache(hub, adapter):
    folder = open_model("someone/tiny-llava")
    assert folder.path == hub and folder.fingerprint == open_folder(BASE).fingerprint
    assert config_of("someone/tiny-llava") == folder.config
    edit(adapter, base_model_name_or_path="someone/tiny-llava")
    assert open_model(adapter).path == hub


def test_a_name_that_is_not_there_is_never_downloaded(hub, monkeypatch, capfd):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused("someone/other", "someone/other", str(hub.parents[2]), "hf download someone/other")
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "--model", "someone/other", "--data", str(FIXTURES / "pairs.jsonl")])
    said = capfd.readouterr()
    assert caught.value.code == 2 and said.err.count("\n") == 1 and "hf download someone/other" in said.err
    refused("nothing", "nothing", "config.json")
    refused("x" * 5000, "x")
    refused("a\0b/c")
