"""Runs with further references: equal ones are DPO, others are stored, a run goes on only with the same."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from goldens import FIXTURES
from refusals import refusal
from runs import MODEL, PAIRS, TINY, EachStep, bundle, compiling, events, losses, rows, same
from safetensors.numpy import load_file, save_file

import mllm_align
from mllm_align import DPO, MRPO, train
from mllm_align.config import MeshConfig
from mllm_align.models.huggingface import open_folder
from mllm_align.prepare import prepare
from mllm_align.sharding import make_mesh
from mllm_align.training.references import further_logps
from mllm_align.training.run_model import open_references

assert compiling  # a fixture
PLAIN = replace(TINY, objective=DPO(), steps=2)


def mrpo(*names, **fields):
    return replace(PLAIN, objective=MRPO(references=tuple(map(str, names))), **fields)


@pytest.fixture(scope="module")
def other(compiling, tmp_path_factory):
    """A run of DPO on held-out pairs: a second reference over the same base."""
    out = tmp_path_factory.mktemp("references") / "dpo"
    train(PLAIN, bundle(), PAIRS, out, PAIRS)
    return out


@pytest.mark.slow
def test_equal_references_are_dpo(other, tmp_path):
    """In micro-batches, with the run's own reference stored, too, and on held-out pairs."""
    config = mrpo(MODEL, MODEL, micro_batches=2, reference="stored")
    train(config, bundle(), PAIRS, tmp_path / "run", PAIRS)
    assert losses(tmp_path / "run") == pytest.approx(losses(other), rel=1e-5)
    (mine,), (theirs,) = (events(out, "eval") for out in (tmp_path / "run", other))
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_as_reference_moves_the_loss_and_the_run_goes_on(other, tmp_path):
    config = mrpo(other, save_every=1)
    whole = train(config, bundle(), PAIRS, tmp_path / "whole")
    first = losses(tmp_path / "whole")[0]
    assert abs(first - np.log(2)) > 1e-3, "the policy is only one of the references"

    def stop(values):
        if values["step"] == 1:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, bundle(), PAIRS, tmp_path / "run", callbacks=[EachStep(stop)])
    stored = tmp_path / "run" / "references" / "1.npz"
    before = stored.stat().st_mtime_ns
    again = train(config, bundle(), PAIRS, tmp_path / "run")
    assert same(again.trained, whole.trained) and stored.stat().st_mtime_ns == before
    said = refusal(lambda: train(mrpo(MODEL), bundle(), PAIRS, tmp_path / "run"))
    assert "another configuration (objective.references differ)" in said


@pytest.mark.slow
def test_a_reference_has_its_own_prompt_and_must_stay(tmp_path):
    """The same weights with other words around the question are another reference."""
    folder = shutil.copytree(MODEL, tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "QUESTION"))
    train(mrpo(folder, steps=1), bundle(), PAIRS, tmp_path / "run")
    assert abs(losses(tmp_path / "run")[0] - np.log(2)) > 1e-5
    with open(folder / "config.json", "a") as file:
        file.write(" ")
    said = refusal(lambda: train(mrpo(folder, steps=1), bundle(), PAIRS, tmp_path / "run"))
    assert "was started with other references" in said and str(folder) in said


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(other, tmp_path):
    config = mrpo(other, steps=1, batch_size=8)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), jax.devices())
    for name, model in (("one", bundle()), ("eight", mllm_align.load(MODEL, "float32", mesh))):
        train(config, model, PAIRS, tmp_path / name)
    (one,), (eight,) = (events(tmp_path / name, "train") for name in ("one", "eight"))
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert eight["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_a_reward_model_is_refused(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "rewards")
    tensors = load_file(folder / "model.safetensors")
    head = np.ones((1, open_folder(MODEL).config.decoder.hidden), np.float32)
    save_file(tensors | {"score.weight": head}, folder / "model.safetensors")
    said = refusal(lambda: open_references(mrpo(MODEL, folder)))
    assert said.startswith(f"objective.references, {folder}: is a reward model; name models that answer")


def test_references_need_the_models_own_tokens(tmp_path):
    encoder, records, _ = prepare(bundle(), PAIRS, TINY.data, 2)
    sets, folder = {"references": records}, open_folder(FIXTURES / "qwen3_vl")
    said = refusal(lambda: further_logps([folder], bundle(), encoder, sets, TINY, tmp_path))
    assert f"the tokenizer of the reference {folder.path} makes other tokens of a response" in said
    assert not any(tmp_path.iterdir())


def test_without_references_nothing_begins(tmp_path):
    said = refusal(lambda: train(mrpo(), bundle(), rows(2), tmp_path / "run"))
    assert said.startswith("objective.references is empty; name folders or runs")
    assert not (tmp_path / "run").exists()
