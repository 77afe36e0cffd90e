"""`mllm-align export`, at the end of the whole path."""

import json

import pytest
from hub import Hub
from runs import MODEL, events, rows, write_pairs

from mllm_align.cli.verbs import parse


def test_train_score_and_export(run, refused, tmp_path, config_file):
    out, data = tmp_path / "run", write_pairs(tmp_path, rows())
    training = ("train", config_file, "--model", MODEL, "--data", data, "--out", out)
    assert run(*training)[0] == 0
    line = refused(*training, "--seed", 3)
    assert "seed differ" in line and str(out) in line
    assert run("score", "--model", out, "--data", data, "--out", tmp_path / "s", "--data.shapes", 1)[0] == 0
    status, told, _ = run("export", "--run", out, "--out", tmp_path / "aligned")
    assert status == 0 and json.loads(told)["step"] == 4
    assert events(out)[-1]["event"] == "export"
    assert "not empty" in refused("export", "--run", out, "--out", tmp_path / "aligned")
    status, told, _ = run("export", "--run", out, "--out", tmp_path / "adapter", "--adapter")
    assert status == 0 and (tmp_path / "adapter" / "adapter_config.json").is_file()

    (tmp_path / "moved").mkdir()
    moved = json.loads((out / "run.json").read_text()) | {"model": str(tmp_path / "moved")}
    (out / "run.json").write_text(json.dumps(moved))
    assert "moved" in refused("export", "--run", out, "--out", tmp_path / "again")


@pytest.mark.parametrize(
    "words, step", [((), "last"), (("--step", "best"), "best"), (("--step", "12"), 12)]
)
def test_which_checkpoint_is_a_word_or_a_step(words, step):
    assert parse("export", ["--run", "r", "--out", "o", *words]).step == step


def test_push(run, tmp_path, monkeypatch):
    """The address on a line of its own; where the Hub refuses, the folder stays."""

    def made(run, out, **_):
        out.mkdir()
        return {"step": 4}

    monkeypatch.setattr("mllm_align.training.run_model.export_run", made)
    argv = ("export", "--run", tmp_path, "--push", "me/model", "--out")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    status, told, said = run(*argv, tmp_path / "a")
    lines = [json.loads(line) for line in told.splitlines()]
    assert (status, said) == (0, "") and lines[0]["step"] == 4
    assert lines[1] == {"pushed": "https://hub/me/model"} and Hub.made[-1:] == [tmp_path / "a"]

    monkeypatch.setattr(Hub, "upload_folder", None)
    status, told, said = run(*argv, tmp_path / "b")
    assert status == 2 and said.count("\n") == 1 and "b is whole, but can't be pushed to me/model" in said
    assert json.loads(told)["out"] == str(tmp_path / "b") and (tmp_path / "b").is_dir()


def test_what_is_refused(refused, tmp_path):
    argv = ("export", "--run", tmp_path, "--out", tmp_path / "out")
    assert "--push is 'a/b/c'; give owner/name" in refused(*argv, "--push", "a/b/c")
    assert "--step is 'first'; it must be one of last, best or a whole number" in refused(
        *argv, "--step", "first"
    )
    assert "--dtype is 'int8'; it must be one of float32, bfloat16, float16" in refused(
        *argv, "--dtype", "int8"
    )
    assert "is no run folder" in refused(*argv)
