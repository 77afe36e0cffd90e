"""The quickstart: the folder it may use, and a miniature of the whole run."""

import base64
import json
import random
import re
from dataclasses import asdict, replace
from functools import cache

import pytest
from mutants import mutant
from runs import compiling, events, one_device

pytest.importorskip("tensorflow_datasets")

from miniature import MINIATURE, PICTURES

from mllm_align.errors import InputError
from mllm_align.models.bundle import load
from mllm_align.testbed.hallucination import Counts
from mllm_align.testbed.quickstart import experiment as module
from mllm_align.testbed.quickstart import phases
from mllm_align.testbed.quickstart.experiment import run
from mllm_align.testbed.quickstart.phases import Recipe
from mllm_align.testbed.scenes.builder import read
from mllm_align.training.loop import train

assert compiling  # a fixture that every test here takes

MAIN = ("chair_i", "chair_s", "recall", "pope_accuracy")


@pytest.fixture
def no_work(monkeypatch):
    def work(*_, **__):
        raise AssertionError("something is made")

    monkeypatch.setattr(module, "Seed", work)


def test_a_folder_of_something_else_is_refused(tmp_path, no_work):
    (tmp_path / "photo.jpg").write_text("")
    with pytest.raises(InputError, match="holds something else; name a new folder"):
        run(tmp_path)
    with pytest.raises(InputError, match="is a file; name a new folder"):
        run(tmp_path / "photo.jpg")
    assert [file.name for file in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("text", ["", "[]", '{"sugar": "100 g"}', "\xff"])
def test_another_recipe_file_is_left_alone(tmp_path, no_work, text):
    (tmp_path / "recipe.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="holds something else; name a new folder"):
        run(tmp_path)
    assert (tmp_path / "recipe.json").read_text(encoding="latin-1") == text


def test_a_run_of_another_recipe_is_refused(tmp_path, no_work):
    recipe = Recipe()
    with pytest.raises(AssertionError, match="something is made"):
        run(tmp_path, 1, recipe)
    before = (tmp_path / "recipe.json").read_text()
    scenes = replace(recipe.scenes, fog=recipe.scenes.fog / 2 + 0.1)
    for other in (replace(recipe, mask_rate=0.123), replace(recipe, scenes=scenes)):
        with pytest.raises(InputError, match="holds a run of another recipe; name a new folder"):
            run(tmp_path, 1, other)
        assert (tmp_path / "recipe.json").read_text() == before
    for seeds in (1, 3):  # more seeds are the same recipe
        with pytest.raises(AssertionError, match="something is made"):
            run(tmp_path, seeds, recipe)


# ---- the whole -------------------------------------------------------------------------------------


def killed(*_, **__):
    raise KeyboardInterrupt


@cache
def load_on_one(path):
    return load(path, mesh=one_device())


def train_on_one(config, model, data, out):
    return train(config, load_on_one(model), data, out)


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_whole_run_stopped_twice(tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    base, seed = out / "base", out / "seed-0"
    trained = {"words": base, "pairs": base, "sft": seed, "aligned": seed, "control": seed}

    def log(name):
        return trained[name] / "runs" / name / "log.jsonl"

    # Two lessons of the four, of the kinds that there are: captions alone, and with questions.
    monkeypatch.setattr(phases, "LESSONS", (phases.LESSONS[0], phases.LESSONS[-1]))
    recipe = replace(MINIATURE, seeing=(1, 2))

    # Stopped between two phases: what is done stays as it is.
    monkeypatch.setattr(phases, "train", train_on_one)
    monkeypatch.setattr(phases, "load", load_on_one)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(phases, "bdhs", killed)
        run(out, recipe=recipe)
    done = {name: log(name).read_bytes() for name in ("words", "pairs", "sft")}
    assert {file.name for file in out.iterdir()} == {
        "recipe.json",
        "seconds.json",
        "scenes",
        "base",
        "seed-0",
    }
    took = json.loads((out / "seconds.json").read_text())
    assert list(took) == ["draw pictures", "pretraining", "SFT", "BDHS"]

    # Stopped after training and before its export: nothing is trained again.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(phases, "export_run", killed)
        run(out, recipe=recipe)
    assert log("aligned").exists() and not (seed / "aligned").exists()

    results = run(out, recipe=recipe)
    assert {name: log(name).read_bytes() for name in done} == done
    for name, steps in (("pairs", 2), ("sft", 6), ("aligned", 4), ("control", 4)):
        assert [line["step"] for line in events(log(name).parent, "train")] == [1, steps]

    assert results == json.loads((out / "results.json").read_text())
    for name in ("sft", "sft_control", "aligned"):
        for figure in MAIN:
            value = results[name][figure]
            assert set(value) == {"mean", "low", "high", "n"}
            assert 0 <= value["mean"] <= 1
            assert value["low"] - 1e-9 <= value["mean"] <= value["high"] + 1e-9
        assert results[name]["chair_i"]["n"] == PICTURES
    assert set(results["other_splits"]) == {"unbiased", "held_out"}
    assert 0 < results["pairs"]["count"] <= MINIATURE.pairs
    assert list(results["seconds"]) == [*took, "DPO", "further SFT", "evaluate"]
    assert results["seconds"]["SFT"] >= took["SFT"] > 1  # of the process that trained, not of the last

    page = (out / "report.html").read_text()
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    broken = [example.png for example in read(out / "scenes", "broken")]
    assert len(set(map(base64.b64decode, pictures)) & set(broken)) == 12

    # All is there: nothing is made again, and nothing changes.
    before = contents(out)
    capfd.readouterr()
    for work in ("train", "bdhs", "evaluate", "load", "export_run"):
        monkeypatch.setattr(phases, work, killed)
    assert run(out, recipe=recipe) == results
    assert contents(out) == before
    assert str(out / "report.html") in capfd.readouterr().out


def test_hostile_files_are_one_line(tmp_path, monkeypatch):
    """What was measured, and how long it took, with types and fields of other kinds."""
    rng, recipe = random.Random(0), Recipe()
    names = ("draw pictures", "pretraining", "SFT", "BDHS", "DPO", "further SFT", "evaluate")
    seconds = json.dumps(dict.fromkeys(names, 1.5))
    counts = {"counts": [asdict(Counts())], "captions": ["x"]}
    splits = {"broken": counts | {"pope": [["random", True]]}, "unbiased": counts, "held_out": counts}
    measured = json.dumps(
        {"models": dict.fromkeys(phases.MODELS, splits), "pairs": {"pairs": 1, "differ_after": [0.5]}}
    )
    module.take(tmp_path, 1, recipe)
    (tmp_path / "seed-0").mkdir()
    for number in range(150):
        files = {"seconds.json": seconds.encode(), "seed-0/measured.json": measured.encode()}
        name = rng.choice([*files])
        files[name] = mutant(files[name].decode(), rng)
        for file, data in files.items():
            (tmp_path / file).write_bytes(data)
        with pytest.raises(InputError) as refused:  # if for nothing else, as no curve is there
            run(tmp_path, 1, recipe)
        assert "\n" not in str(refused.value), (number, files[name])
