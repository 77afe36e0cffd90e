"""Model folders that are refused, on the command line."""

import json
import shutil
from pathlib import Path

import pytest
from runs import MODEL, PAIRS
from safetensors.numpy import load_file, save_file


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def change_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def change_weights(model: Path, change) -> str:
    tensors = load_file(model / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight") and "language" in n)
    change(tensors, name)
    save_file(tensors, model / "model.safetensors")
    return name


def missing(tensors, name):
    del tensors[name]


def misshapen(tensors, name):
    tensors[name] = tensors[name][:-1].copy()


def pickled(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated(model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda m: change_config(m, model_type="llama"), "model_type 'llama'"),
        (lambda m: change_config(m, mm_vision_tower="openai/clip"), "liuhaotian"),
        (lambda m: (m / "config.json").unlink(), "config.json"),
        (lambda m: (m / "config.json").write_text("{"), "config.json"),
        (lambda m: change_weights(m, missing), "q_proj.weight' missing"),
        (lambda m: change_weights(m, misshapen), "q_proj.weight' has shape"),
        (pickled, "pickled .bin files"),
        (truncated, "is not a whole safetensors file"),
        (lambda m: (m / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=[
        "type",
        "liuhaotian",
        "no-config",
        "bad-config",
        "missing",
        "misshapen",
        "bin",
        "truncated",
        "none",
        "tokenizer",
    ],
)
def test_bad_models(refused, tmp_path, config_file, model, spoil, said):
    spoil(model)
    lines = [
        refused("score", "--model", model, "--data", PAIRS, "--out", tmp_path / "scores"),
        refused("train", config_file, "--model", model, "--data", PAIRS, "--out", tmp_path / "run"),
        refused("inspect", "--model", model, "--data", PAIRS),
    ]
    for line in lines:
        assert said in line and str(model) in line
