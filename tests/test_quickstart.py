"""The quickstart: its figures from made-up measurements, and a miniature of the whole run."""

import base64
import json
import re
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
from runs import compiling, events, one_device

pytest.importorskip("tensorflow_datasets")

from mllm_align import quickstart
from mllm_align.data.scenes.builder import read
from mllm_align.data.scenes.world import Settings
from mllm_align.errors import InputError
from mllm_align.evaluate.hallucination import Counts
from mllm_align.evaluate.intervals import over_seeds
from mllm_align.models.bundle import load
from mllm_align.quickstart import Recipe, figures, run, summary, verdict, written_spans
from mllm_align.training.loop import train

assert compiling  # a fixture that every test here takes

MAIN = ("chair_i", "chair_s", "recall", "pope_accuracy")


# ---- rejected responses ----------------------------------------------------------------------------

CHOSEN = "Yes, there is a cup. We see a red key. No, there is no hat."


def sentence(text, kept, written, swapped=None):
    """What BDHS records of a sentence of CHOSEN that was kept up to `kept` and written anew from there."""
    start = CHOSEN.index(text)
    return {
        "sentence": [start, start + len(text)],
        "cut": start + len(kept),
        "written": written,
        "swapped": swapped,
    }


ONE = ("Yes, there is a cup.", "Yes, there")
TWO = ("We see a red key.", "We see a")
THREE = ("No, there is no hat.", "No, there is")


@pytest.mark.parametrize(
    ("sentences", "rejected"),
    [
        ([], CHOSEN),
        (
            [sentence(*ONE, " are two keys.")],
            "Yes, there are two keys. We see a red key. No, there is no hat.",
        ),
        (
            [sentence(*TWO, " moon.")],
            "Yes, there is a cup. We see a moon. No, there is no hat.",
        ),
        (
            [sentence(*ONE, " is no cup.", ["Yes", "No"])],
            "No, there is no cup. We see a red key. No, there is no hat.",
        ),
        (
            [
                sentence(*ONE, " is none.", ["Yes", "No"]),
                sentence(*TWO, " large blue lock."),
                sentence(*THREE, " a boot", ["No", "Yes"]),
            ],
            "No, there is none. We see a large blue lock. Yes, there is a boot",
        ),
        (
            [sentence(*ONE, " is.", ["Yes", "No"]), sentence(*THREE, "", ["No", "Yes"])],
            "No, there is. We see a red key. Yes, there is",
        ),
    ],
)
def test_written_spans_hold_what_was_written(sentences, rejected):
    spans = written_spans({"rejected": rejected, "bdhs": {"sentences": sentences}})
    assert [rejected[a:b] for a, b in spans] == [each["written"] for each in sentences]


# ---- figures ---------------------------------------------------------------------------------------


def measure(wrong, images=40, recalled=2, right=0.75):
    """A model that names four things in each picture, `wrong` of them in all not there."""
    counts = [
        Counts(
            captions=1,
            mentions=4,
            hallucinated=int(i < wrong),
            with_hallucination=int(i < wrong),
            present=3,
            recalled=recalled,
            sentences=2,
            words=20,
        )
        for i in range(images)
    ]
    pope = [("random", i < 2 * right * images) for i in range(2 * images)]
    pope += [("adversarial", i < right * images) for i in range(images)]
    return {"captions": ["A cup."] * images, "counts": [asdict(c) for c in counts], "pope": pope}


def measured(sft=20, control=16, aligned=4, seconds=1.0, pairs=10):
    wrong = {"sft": sft, "sft_control": control, "aligned": aligned}
    models = {
        name: {"broken": measure(n), "unbiased": measure(n // 2), "held_out": measure(n // 4)}
        for name, n in wrong.items()
    }
    for splits in models.values():
        del splits["held_out"]["pope"]  # asked on one split or more
    return {
        "models": models,
        "pairs": {"pairs": pairs, "differ_after": [0.5, pairs / 20]},
        "seconds": {"SFT": seconds, "BDHS": 2 * seconds},
    }


def test_figures_of_a_model():
    found = figures(measure(8))
    assert {"mean", "low", "high", "n"} == set(found["chair_i"])
    assert found["chair_i"]["mean"] == pytest.approx(8 / 160) and found["chair_i"]["n"] == 40
    assert found["chair_s"]["mean"] == pytest.approx(8 / 40)
    assert found["recall"]["mean"] == pytest.approx(2 / 3)
    assert found["words"]["mean"] == 20
    assert found["pope_accuracy"] == pytest.approx({**found["pope_accuracy"], "mean": 0.75, "n": 120})
    assert (found["pope_random"]["n"], found["pope_adversarial"]["n"]) == (80, 40)
    assert "pope_popular" not in found
    for name in ("chair_i", "chair_s", "pope_accuracy"):
        assert found[name]["low"] < found[name]["mean"] < found[name]["high"]


def test_figures_are_the_same_from_json():
    assert figures(json.loads(json.dumps(measure(8)))) == figures(measure(8))


def test_summary_of_one_seed_has_intervals_over_images():
    one = measured()
    results = summary([one], 0.99)
    assert (results["seeds"], results["split"]) == ([0], "broken")
    assert results["interval"] == "95% bootstrap over images"
    for name in ("sft", "sft_control", "aligned"):
        assert results[name] == figures(one["models"][name]["broken"])
        assert results["other_splits"]["unbiased"][name] == figures(one["models"][name]["unbiased"])
        held_out = results["other_splits"]["held_out"][name]
        assert held_out == figures(one["models"][name]["held_out"])
        assert "chair_i" in held_out and "pope_accuracy" not in held_out
    assert results["pairs"] == {"count": 10, "differ_after_iteration": {"0.99": [0.5, 0.5]}}
    assert results["seconds"] == {"SFT": 1.0, "BDHS": 2.0}
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_summary_of_three_seeds_has_intervals_over_seeds():
    seeds = [measured(20, 16, 4), measured(24, 20, 8, pairs=12), measured(16, 18, 6, 0.5, pairs=14)]
    results = summary(seeds, 1.0)
    assert results["seeds"] == [0, 1, 2]
    assert results["interval"] == "95% Student t over 3 seeds"
    assert results["sft"]["chair_i"] == over_seeds([20 / 160, 24 / 160, 16 / 160]).to_json()
    assert results["aligned"]["chair_s"]["mean"] == pytest.approx(np.mean([4, 8, 6]) / 40)
    assert results["other_splits"]["unbiased"]["sft_control"]["chair_i"]["n"] == 3
    assert results["pairs"]["count"] == 36
    assert results["pairs"]["differ_after_iteration"] == {"1": pytest.approx([0.5, 0.6])}
    assert results["seconds"] == {"SFT": 2.5, "BDHS": 5.0}


def shown(sft, control, aligned, recall=(0.7, 0.7)):
    """Results with these intervals of CHAIR_i."""

    def interval(mean, half=0.0):
        return {"mean": mean, "low": mean - half, "high": mean + half, "n": 300}

    models = {
        name: {"chair_i": interval(*value)}
        for name, value in (("sft", sft), ("sft_control", control), ("aligned", aligned))
    }
    models["sft"]["recall"], models["aligned"]["recall"] = map(interval, recall)
    return models


def test_verdict_of_a_clear_effect():
    assert verdict(shown((0.3, 0.03), (0.25, 0.03), (0.1, 0.02))) == [
        "Fewer hallucinated things than the SFT model: CHAIR_i from 30.0% to 10.0%; intervals do not "
        "overlap.",
        "Fewer hallucinated things than as many further steps of SFT: CHAIR_i from 25.0% to 10.0%; "
        "intervals do not overlap.",
        "Recall is the same.",
    ]


def test_verdict_says_where_the_control_does_as_well():
    clear, unclear, _ = verdict(shown((0.3, 0.03), (0.12, 0.03), (0.1, 0.02)))
    assert clear.startswith("Fewer hallucinated things than the SFT model")
    assert unclear == (
        "No clear effect against as many further steps of SFT: CHAIR_i from 12.0% to 10.0%, and the "
        "intervals overlap."
    )


def test_verdict_hides_no_harm():
    worse, unclear, _ = verdict(shown((0.1, 0.02), (0.28, 0.03), (0.3, 0.03)))
    assert worse == (
        "More hallucinated things than the SFT model: CHAIR_i from 10.0% to 30.0%; intervals do not "
        "overlap."
    )
    assert unclear.startswith("No clear effect against as many further steps of SFT")


@pytest.mark.parametrize(
    ("recall", "said"),
    [
        ((0.7, 0.65), "Recall is lower by 5.0 points."),
        ((0.7, 0.712), "Recall is higher by 1.2 points."),
        ((0.7, 0.6999), "Recall is the same."),
    ],
)
def test_verdict_on_recall(recall, said):
    assert verdict(shown((0.3, 0.03), (0.25, 0.03), (0.1, 0.02), recall))[-1] == said


def test_curves_of_a_run_that_was_begun_twice(tmp_path):
    for name in ("sft", "aligned"):
        lines = [{"event": "start", "step": 0}]
        for begun in (3.0, 2.0):
            values = [(1, begun), (50, begun / 2)]
            lines += [{"event": "train", "step": s, "loss": v, "rewards/margin": v} for s, v in values]
        lines.append({"event": "train", "step": 100, "loss": 0.5, "rewards/margin": 0.5})
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for curve in quickstart._curves(tmp_path):
        assert list(curve.series.values()) == [[(1, 2.0), (50, 1.0), (100, 0.5)]]


# ---- the folder ------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    def work(*_, **__):
        raise AssertionError("something is made")

    monkeypatch.setattr(quickstart, "_Seed", work)


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

PICTURES = 40
SIZES = ("train", "held_out", "unbiased", "broken", "lessons")
MINIATURE = Recipe(
    scenes=Settings(bias=0.8, grain=10.0, fog=0.2, **dict.fromkeys(SIZES, PICTURES)),
    batch=8,
    seeing=(1, 1, 2),
    speaking=4,
    sft=6,
    dpo=4,
    pairs=16,
)


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
    seed, runs = out / "seed-0", out / "seed-0" / "runs"

    # Stopped between two phases: what is done stays as it is.
    monkeypatch.setattr(quickstart, "train", train_on_one)
    monkeypatch.setattr(quickstart, "load", load_on_one)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quickstart, "bdhs", killed)
        run(out, recipe=MINIATURE)
    done = {name: (runs / name / "log.jsonl").read_bytes() for name in ("seeing", "speaking", "sft")}
    assert sorted(file.name for file in out.iterdir()) == ["recipe.json", "seed-0"]
    took = json.loads((seed / "seconds.json").read_text())
    assert set(took) == {"draw pictures", "SFT", "BDHS"}

    # Stopped after training and before its export: nothing is trained again.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quickstart, "export_run", killed)
        run(out, recipe=MINIATURE)
    assert (runs / "aligned").exists() and not (seed / "aligned").exists()

    results = run(out, recipe=MINIATURE)
    assert {name: (runs / name / "log.jsonl").read_bytes() for name in done} == done
    for name, steps in (("seeing", 4), ("speaking", 4), ("sft", 6), ("aligned", 4), ("control", 4)):
        assert [line["step"] for line in events(runs / name, "train")] == [1, steps]

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
    phases = ["draw pictures", "SFT", "BDHS", "DPO", "further SFT", "evaluate"]
    assert list(results["seconds"]) == phases
    assert results["seconds"]["SFT"] >= took["SFT"] > 1  # of the process that trained, not of the last

    page = (out / "report.html").read_text()
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    broken = [example.png for example in read(seed / "scenes", "broken")]
    assert len(set(map(base64.b64decode, pictures)) & set(broken)) == 12

    # All is there: nothing is made again, and nothing changes.
    before = contents(out)
    capfd.readouterr()
    for work in ("train", "bdhs", "generate", "load", "export_run"):
        monkeypatch.setattr(quickstart, work, killed)
    assert run(out, recipe=MINIATURE) == results
    assert contents(out) == before
    assert str(out / "report.html") in capfd.readouterr().out
