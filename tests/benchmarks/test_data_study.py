"""The data study: its sets of pairs from scenes, with made-up model responses, and its page."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_datasets")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from scenes_study import sets, sets_page
from scenes_study.sets import SETS, Sets
from test_study import row

from mllm_align.testbed.hallucination import count
from mllm_align.testbed.quickstart.phases import Clock, Pictures, Recipe
from mllm_align.testbed.scenes import world

SEEDS = (0, 1, 2)
SIZE = 12


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("data_study")
    few = dict.fromkeys(("held_out", "broken", "unbiased", "lessons"), 1)
    recipe = Recipe(scenes=world.Settings(train=SIZE, **few))
    made = Sets(out / "seed-0", 0, recipe, Pictures(out / "scenes", recipe.scenes), Clock(out / "s.json"))
    made.data.mkdir(parents=True)
    captions = [line["chosen"] for _, line in made.rows(SIZE)]
    made.samples = lambda size: [["Nothing is there.", text, "We see."] for text in captions[:size]]
    made.better = lambda size: [[text] for text in captions[:size]]
    made.bdhs_pairs = lambda: made.corrupted()
    return made


@pytest.mark.parametrize("name", SETS)
def test_pairs_of_every_set(study, name):
    rows = list(SETS[name].make(study, 4))
    assert len(rows) == 4
    assert all(
        r["chosen"] and r["rejected"] != r["chosen"] and (study.data / r["image"]).exists() for r in rows
    )
    assert rows == list(SETS[name].make(study, 8))[: len(rows)] or name == "other_picture"


def wrong(study, name):
    """Share of the claims of a set's rejected responses that are false."""
    scenes = {e.id: e.scene for e in study.read("train")}
    counts = [count(scenes[r["id"].rsplit("-", 1)[0]], r["rejected"]) for r in SETS[name].make(study, SIZE)]
    false = sum(c.hallucinated + c.attributes_wrong + c.places_wrong + c.relations_wrong for c in counts)
    return false / sum(c.mentions + c.attributes + c.places + c.relations for c in counts)


def test_rejected_responses_get_farther(study):
    found = [wrong(study, name) for name in ("facts_1", "facts_3", "facts_all")]
    assert found == sorted(set(found)) and found[-1] > 0.8


def test_best_and_worst_are_ranked_by_the_truth(study):
    for made in SETS["best_and_worst"].make(study, SIZE):
        assert made["rejected"] in ("Nothing is there.", "We see.") != made["chosen"]


def test_questions_get_false_answers(study):
    assert sets._opposite("Yes, there is a small red cup.") == "No, there is no cup."
    assert sets._opposite("No, we see no apple.") == "Yes, there is an apple."
    assert sets._opposite("The cup is red.") is None
    made = list(SETS["questions"].make(study, SIZE))
    starts = {(r["chosen"][:3], r["rejected"][:3]) for r in made if r["chosen"][:3] in ("Yes", "No,")}
    assert starts <= {("Yes", "No,"), ("No,", "Yes")} and starts


def test_data_are_written_once_and_without_unusable_pairs(study, monkeypatch):
    def make(_, size):
        _, first = next(study.rows(1))
        yield from (first | {"rejected": other} for other in ("There is a cup.", None, first["chosen"]))

    monkeypatch.setitem(SETS, "facts_1", replace(SETS["facts_1"], make=make))
    path, facts = study._data(Sets.variants["facts_1"])
    assert facts["pairs"]["count"] == 1 and len(path.read_text().splitlines()) == 1
    before = path.stat().st_mtime_ns
    study._data(Sets.variants["facts_1"])
    assert path.stat().st_mtime_ns == before


def test_settings_name_the_size(study):
    assert study.stamp("bdhs_250")["settings"]["pairs"] == 250
    assert "pairs" not in study.stamp("sft")["settings"]


def written(folder, seeds):
    results = folder / "results"
    results.mkdir()
    for number, name in enumerate(sets_page.TITLES):
        for seed in seeds:
            made = json.dumps(row(name, seed, 10 + 2 * number + seed))
            (results / f"{name}-{seed}.json").write_text(made)
    sets_page.write(results, folder / "docs" / "data-study.md")
    return (folder / "docs" / "data-study.md").read_text()


def test_whole_page(tmp_path):
    text = written(tmp_path, SEEDS)
    assert "Not complete" not in text and "| SFT (`sft`) | 3 | 55.0" in text
    assert len(re.findall(r"^### \d\. .+\n\n\*\*(?:Reproduced|Not|Cannot)", text, re.M)) == 4
    svg = (tmp_path / "docs" / "figures" / "data_study_sizes.svg").read_text()
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 10 and "4,000" in svg
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_what_is_missing_is_said(tmp_path):
    assert "40 of 60 rows" in written(tmp_path, (0,))


def test_names_are_those_of_sets():
    named = {name for f in sets_page.FINDINGS for c in f.claims for name in (c.one, c.other)}
    shown = {name for *_, names in sets.groups() for name in names}
    assert named <= set(sets_page.TITLES) == shown
