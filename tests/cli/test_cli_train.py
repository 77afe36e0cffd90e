"""`mllm-align train`."""

import json

import pytest
from runs import MODEL, PAIRS

from mllm_align.errors import InputError


def test_batches_and_meshes_that_do_not_fit(refused, tmp_path, config_file, monkeypatch):
    monkeypatch.undo()
    argv = ("train", config_file, "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "run")
    assert "it must be a multiple of 8" in refused(*argv, "--batch-size", 12)
    assert "data 3 x fsdp 1 x tensor 1 does not make 8 devices" in refused(*argv, "--mesh.data", 3)
    scoring = ("score", "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "scores")
    assert "does not make 8 devices" in refused(*scoring, "--mesh.fsdp", 3)
    assert "batch_size is 0" in refused(*scoring, "--batch-size", 0)


def test_reward_names_the_annotator_and_its_model(run):
    kinds = ("--objective", "ppo", "--online", "rewards", "--print-config")
    for words in (["--reward", "runs/r"], ["--reward=runs/r"]):
        status, out, _ = run("train", "dpo_tiny", *kinds, *words)
        annotator = json.loads(out)["online"]["annotator"]
        assert status == 0 and annotator["model"] == "runs/r"


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID is '2' and JAX_NUM_PROCESSES '2'; wanted 0 to N - 1",
        ),
    ],
)
def test_an_environment_that_says_half_of_it(refused, config_file, tmp_path, monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = ("--model", MODEL, "--data", PAIRS, "--out", tmp_path / "run")
    assert said in refused("train", config_file, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (InputError("no"), 2)])
def test_a_start_that_fails_leaves_nothing(run, tmp_path, config_file, monkeypatch, error, status):
    """And the mended command, with another config, goes its way."""

    def fails(*_):
        raise error

    words = ["train", config_file, "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "a" / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("mllm_align.training.loop._Run.begin", fails)
        assert run(*words)[0] == status
    assert not list(tmp_path.iterdir())
    assert run(*words, "--steps", 1, "--seed", 1)[0] == 0
