"""The objectives' study: its grid and rule of choice, its page, and what its script makes."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tensorflow_datasets")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from refusals import refusal
from scenes_study import objectives, objectives_page
from scenes_study.objectives import METHODS, SEED, TITLES, Objectives, chosen, tuning_name, tuning_names
from test_study import counted, row

from mllm_align import MRPO
from mllm_align.testbed.quickstart.phases import Clock, Pictures, Recipe
from mllm_align.testbed.scenes.draw import CELL

SEEDS = (0, 1, 2)
RECIPE = Recipe()


def tuned(name, wrong=20, recalled=160):
    return row(name, SEED, wrong) | {"splits": {"tuning": counted(wrong, recalled)}}


def grid(method, *pairs):
    """Rows of a method's settings from (wrong, recalled) of each."""
    names = [tuning_name(method, setting) for setting in METHODS[method].grid]
    made = {name: tuned(name, *pair) for name, pair in zip(names, pairs, strict=True)}
    return made | {"tune_sft": tuned("tune_sft")}


def test_every_method_has_as_many_settings():
    assert {len(method.grid) for method in METHODS.values()} == {6}
    names = tuning_names(list(METHODS))
    assert len(names) == len(set(names)) == 1 + 6 * len(METHODS)
    made = objectives.tuning_variants()
    assert set(names) == set(made) and {v.rate for n, v in made.items() if n != "tune_sft"} == {2e-4, 5e-4}
    settings = {name: method.grid[0] for name, method in METHODS.items()}
    assert set(objectives.variants(settings)) == set(TITLES)


def test_the_lowest_chair_of_those_that_keep_recall_is_chosen():
    kept, lost = 157, 155  # of 200; SFT's is 160, and four may be lost
    rows = grid("dpo", (9, kept), (7, lost), (8, kept), (30, 190), (20, kept), (20, kept))
    assert chosen(rows) == {"dpo": METHODS["dpo"].grid[2]}
    rows = grid("ipo", (5, 100), (5, 100), (30, 150), (5, 100), (5, 100), (5, 100))
    assert chosen(rows)["ipo"] == METHODS["ipo"].grid[2], "the highest recall where none keeps it"
    rows.pop(tuning_name("ipo", METHODS["ipo"].grid[0]))
    assert chosen(rows) == {}, "the whole grid is needed"


def study(tmp_path, settings=None, recipe=RECIPE):
    made = objectives.variants(settings or {name: method.grid[0] for name, method in METHODS.items()})
    places = tmp_path, 0, recipe, Pictures(tmp_path / "scenes", recipe.scenes), Clock(tmp_path / "s.json")
    return Objectives(*places, variants=made)


def test_settings_of_rows_name_the_tuned_ones_and_no_place(tmp_path):
    one = study(tmp_path)
    for name in TITLES:
        stamp = json.dumps(one.stamp(name)["settings"])
        assert str(tmp_path) not in stamp and ('"learning_rate": 0.0002' in stamp or name == "sft")
    other = study(tmp_path, {"mdpo": (1.0, 5e-4)})
    assert other.stamp("mdpo")["settings"] != one.stamp("mdpo")["settings"]
    config = one.config(one.variants["mrpo"], tmp_path / "scenes", tmp_path / "runs")
    assert isinstance(config.objective, MRPO)
    assert config.objective.references == (str(tmp_path / "control"),)


def seen(right, margin):
    return {"right": right, "pairs": 300, "margin": margin}


def written(folder, seeds):
    results = folder / "results"
    results.mkdir()
    for number, name in enumerate(TITLES):
        for seed in seeds:
            made = row(name, seed, 10 + 2 * number + seed) | {"visual": seen(270 + seed, 6.0 + seed)}
            (results / f"{name}-{seed}.json").write_text(json.dumps(made))
    for name, made in grid("dpo", *[(9, 160)] * 5, (5, 160)).items():
        (results / f"{name}-{SEED}.json").write_text(json.dumps(made))
    objectives_page.write(results, folder / "docs" / "objectives-study.md")
    return (folder / "docs" / "objectives-study.md").read_text()


def test_whole_page(tmp_path):
    text = written(tmp_path, SEEDS)
    assert "Not complete" not in text and "| SFT (`sft`) | 3 | 5.5" in text and "| 90.3 ± " in text
    assert "| 7.0 ± 2.5 |" in text, "nats are no percent"
    assert "visual margin: `mdpo` higher than `dpo` | 3 | +0.0 (+0.0 to +0.0)" in text
    assert "**1, 0.0005: 2.5 / 80.0**" in text and text.count("**1, 0.0005") == 1
    assert len(re.findall(r"^### \d\. .+\n\n\*\*(?:Reproduced|Not|Cannot)", text, re.M)) == 5
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_what_is_missing_is_said(tmp_path):
    assert f"{2 * len(TITLES)} of {3 * len(TITLES)} rows" in written(tmp_path, (0,))


def test_an_edited_picture_differs_in_one_thing(tmp_path):
    few = replace(RECIPE.scenes, train=1, held_out=12, unbiased=1, broken=1, lessons=1)
    one = study(tmp_path, recipe=replace(RECIPE, scenes=few))
    rows = [json.loads(line) for line in one.edited().read_text().splitlines()]
    scenes = [example.scene for example in one.read("held_out")]
    assert len(rows) == len(scenes) == 12
    for scene, line in zip(scenes, rows, strict=True):
        other = objectives.with_another(scene)
        ((old, new),) = [pair for pair in zip(scene.things, other.things, strict=True) if len({*pair}) == 2]
        assert replace(new, kind=old.kind) == old and new.kind not in scene.kinds
        mine, edited = (np.asarray(Image.open(one.data / line[key])) for key in ("image", "rejected_image"))
        changed = (mine != edited).any(-1)
        cell = np.zeros_like(changed)
        cell[old.row * CELL : (old.row + 1) * CELL, old.column * CELL : (old.column + 1) * CELL] = True
        assert changed.any() and not changed[~cell].any()


def test_names_are_those_of_rows():
    assert {c.one for f in objectives_page.FINDINGS for c in f.claims} <= set(TITLES)
    assert set(objectives_page.FORMS) <= set(TITLES)


def test_settings_are_chosen_before_the_rows_that_take_them(tmp_path, monkeypatch):
    import objectives_study

    asked = []

    class Made(Objectives):
        def begin(self, base):
            pass

        def variant(self, name):
            asked.append((name, self.seed))
            wrong = 5 if name == "tune_dpo_1_0.0005" else 9
            made = tuned(name, wrong) if name.startswith("tune") else row(name, 9, wrong)
            return {key: value for key, value in made.items() if key not in ("settings", "seed", "variant")}

    monkeypatch.setattr(objectives_study, "Objectives", Made)
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    places += ["--page", str(tmp_path / "docs" / "page.md"), "--seeds", "9"]
    objectives_study.main([*places, "--only", "sft", "mixed_dpo"])
    assert asked == [*((name, SEED) for name in tuning_names(["dpo"])), ("sft", 9), ("mixed_dpo", 9)]
    made = json.loads((tmp_path / "results" / "mixed_dpo-9.json").read_text())["settings"]["train"]
    assert made["objective"]["beta"] == 1 and made["optim"]["learning_rate"] == 5e-4
    asked.clear()
    objectives_study.main([*places, "--only", "mixed_dpo", "dpo"])
    assert asked == [("dpo", 9)]
    said = refusal(lambda: objectives_study.main([*places[:-1], str(SEED)]))
    assert "--seeds has 3, which settings are chosen on" in said
