"""The study's page from made-up rows: figures, verdicts, what is said of rows that are missing."""

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("tensorflow_datasets")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from scenes_study import page
from scenes_study.findings import FINDINGS, LEARNED, MARGIN, Claim, judge_claim, judge_finding
from scenes_study.rows import REWARDS, difference, figure, over_pictures, read_rows, same, spread, useful
from scenes_study.words import PAPERS, TITLES

from mllm_align.testbed.quickstart.phases import Recipe

SEEDS = (0, 1, 2)
PICTURES = 50


def counted(wrong, recalled):
    """Counts of captions that name 4 things each; `wrong` of 200 are not there."""
    each = [wrong // PICTURES + (i < wrong % PICTURES) for i in range(PICTURES)]
    counts = {
        "captions": PICTURES,
        "mentions": 4 * PICTURES,
        "hallucinated": wrong,
        "with_hallucination": sum(n > 0 for n in each),
        "expected": wrong // 2,
        "present": 4 * PICTURES,
        "recalled": recalled,
        "attributes": 100,
        "attributes_wrong": 10,
        "places": 50,
        "places_wrong": 10,
        "relations": 50,
        "relations_wrong": 30,
        "sentences": 100,
        "unparsed": 0,
        "words": 20 * PICTURES,
    }
    kept = {"mentions": [4] * PICTURES, "hallucinated": each, "present": [4] * PICTURES}
    return {"counts": counts, "each": kept | {"recalled": [recalled / PICTURES] * PICTURES}}


def row(variant, seed, wrong, recalled=160):
    splits = {"broken": counted(wrong, recalled), "unbiased": counted(wrong, recalled)}
    splits["broken"]["pope"] = {"random": [60, 100], "adversarial": [50, 100]}
    made = {"variant": variant, "seed": seed, "settings": {}, "splits": splits, "seconds": {"whole": 90.0}}
    if not variant.startswith("sft"):
        last = {"loss": 0.1, "rewards/margin": 2.0}
        made["training"] = {"last_steps": last, "means": {"seconds_per_step": 0.5, "groups_used": 1.0}}
        counts = splits["broken"]["counts"]
        made["pairs"] = {"count": 10, "words_changed": 0.2, "rejected": counts}
    if variant.startswith("bdhs") and "online" not in variant:
        made["pairs"]["differ_after"] = [0.5, 0.9]
    return made


def rows(**wrong):
    """Rows of three seeds; a number or one for each seed."""
    made = {}
    for name, numbers in wrong.items():
        numbers = numbers if isinstance(numbers, tuple) else (numbers,) * 3
        made[name.replace("__", ".")] = {s: row(name, s, n) for s, n in zip(SEEDS, numbers, strict=False)}
    return made


def judge(seed, mean, apart=True):
    judged = {"pairs": 300, "decided": 20, "p_of_chance": 0.01, "apart_from_chance": apart}
    return {"variant": "self_judge", "seed": seed, "judged": judged | {"accuracy": {"mean": mean}}}


def rewarded(name, seed, right):
    asked = {"pairs": 300, "right": right, "length_correlation": 0.1}
    kinds = dict.fromkeys(REWARDS.values(), asked)
    return {"variant": name, "seed": seed, "settings": {}, "asked": kinds, "seconds": {"whole": 90.0}}


# ---- figures ---------------------------------------------------------------------------------------


def test_figures_are_ratios_of_counts():
    made = row("sft", 0, wrong=30, recalled=150)
    assert figure(made, "chair_i") == 30 / 200
    assert figure(made, "recall") == 150 / 200
    assert figure(made, "details") == 50 / 200
    assert figure(made, "pope") == 110 / 200
    assert figure(made, "words") == 20
    made["splits"]["broken"]["counts"]["relations"] = 0
    assert math.isnan(figure(made, "relation_error"))


def test_spread_is_students_t_over_seeds():
    found = spread(rows(sft=(20, 30, 40))["sft"], "chair_i")
    assert found.mean == pytest.approx(0.15) and found.n == 3
    assert found.high - found.mean == pytest.approx(4.3027 * 0.05 / math.sqrt(3), rel=1e-4)


def test_differences_pair_the_seeds_that_both_have():
    made = rows(sft=(20, 40, 60), aligned=(10, 30))
    found = difference(made["aligned"], made["sft"], "chair_i")
    assert found.n == 2 and [found.mean, found.low, found.high] == pytest.approx([-0.05] * 3)
    pictures = over_pictures(made["aligned"], made["sft"], "chair_i")
    assert pictures.n == PICTURES and pictures.mean == pytest.approx(-0.05)
    assert pictures.low < -0.05 < pictures.high
    assert over_pictures(made["sft"], made["sft"], "details") is None
    assert over_pictures(made["sft"], {}, "chair_i") is None


# ---- verdicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "extra", "verdict"),
    [
        ((10, 11, 12), (20, 21, 23), {}, "holds"),
        ((20, 21, 23), (10, 11, 12), {}, "contradicted"),
        ((10, 30, 20), (20, 21, 23), {}, "cannot be told"),
        ((10,), (20,), {}, "cannot be told"),
        ((), (), {}, "cannot be told"),
        ((20, 21, 23), (10, 11, 12), {"higher": True}, "holds"),
        ((10, 11, 12), (20, 21, 23), {"higher": True}, "contradicted"),
        ((21, 22, 24), (20, 21, 23), {"not_worse": True}, "holds"),
        ((31, 32, 34), (20, 21, 23), {"not_worse": True}, "contradicted"),
        ((19, 20, 22), (20, 21, 23), {"not_worse": True, "higher": True}, "holds"),
        ((10, 11, 12), (20, 21, 23), {"not_worse": True, "higher": True}, "contradicted"),
        ((24, 25, 27), (20, 22, 23), {"not_worse": True}, "cannot be told"),
    ],
)
def test_claims(one, other, extra, verdict):
    assert MARGIN == 0.02
    made = rows(one=one, other=other)
    assert judge_claim(made, Claim("one", "other", **extra)).verdict == verdict


def finding(start):
    return next(f for f in FINDINGS if f.words.startswith(start))


def test_a_finding_needs_all_of_its_claims():
    attention = finding("Attention")
    better = {"bdhs_attn_0__99": (10, 11, 12), "povid_style": (40, 42, 43)}
    made = rows(**better, bdhs_noise=(20, 22, 23), bdhs_unguided=(20, 22, 23))
    assert judge_finding(made, attention)[0] == "reproduced"
    made = rows(**better, bdhs_noise=(20, 22, 23), bdhs_unguided=(5, 22, 13))
    assert judge_finding(made, attention)[0] == "cannot be told"
    made = rows(**better, bdhs_noise=(1, 3, 2), bdhs_unguided=(5, 22, 13))
    assert judge_finding(made, attention)[0] == "not reproduced"
    assert judge_finding({}, attention)[0] == "cannot be told"


def test_chair_misleads_where_recall_falls_too():
    misleading = finding("CHAIR")
    made = rows(sft=(30, 31, 33), one=(10, 11, 12))
    assert judge_finding(made, misleading)[0] == "cannot be told"  # recall is the same
    for seed in SEEDS:
        made["one"][seed] = row("one", seed, 10, recalled=170 + seed)
    assert judge_finding(made, misleading)[0] == "not reproduced"
    for seed in SEEDS:
        made["two"] = made.get("two", {}) | {seed: row("two", seed, 10, recalled=120 + seed)}
    assert judge_finding(made, misleading)[0] == "reproduced"


def test_names_are_those_of_variants():
    named = {name for f in (*FINDINGS, *LEARNED) for c in f.claims for name in (c.one, c.other)}
    assert named <= set(TITLES) and {n for *_, names in PAPERS for n in names} <= set(TITLES)


# ---- the page --------------------------------------------------------------------------------------


def test_rows_of_another_recipe_are_named_so():
    made = rows(sft=1)
    today = json.loads(json.dumps(asdict(Recipe())))
    made["sft"][0]["settings"] = {"recipe": today}
    assert page.earlier(made) == ""
    made["sft"][1]["settings"] = {"recipe": today | {"sft": 5}}
    assert page.earlier(made).startswith("> Not of today's pictures")


def written(folder, made, judges=()):
    results = folder / "results"
    results.mkdir()
    for number, each in enumerate([*(r for rs in made.values() for r in rs.values()), *judges]):
        (results / f"{number}.json").write_text(json.dumps(each))
    page.write(results, folder / "docs" / "study.md")
    return (folder / "docs" / "study.md").read_text()


def everything(seeds=SEEDS):
    names = [name for name in TITLES if not name.endswith("self")]
    made = {n: {s: row(n, s, 10 + 3 * i + s) for s in seeds} for i, n in enumerate(names)}
    return made | {n: {s: rewarded(n, s, 270 - 3 * s) for s in seeds} for n in REWARDS}


def test_whole_page(tmp_path):
    text = written(tmp_path, everything(), [judge(s, 0.4, apart=False) for s in SEEDS])
    assert "Not complete" not in text and "left out" in text
    line = next(line for line in text.splitlines() if "(`sft`)" in line)
    assert line.startswith("| SFT (`sft`) | 3 | 5.5 ± 1.2 |")
    assert len(re.findall(r"^### \d\. .+\n\n\*\*(?:Reproduced|Not|Cannot)", text, re.M)) == 13
    assert "| corrupted | 3 | 89.0 ± 2.5 | 89.0 ± 2.5 | 89.0 ± 2.5 | 0.10 |" in text
    for name in re.findall(r"\((figures/.*?\.svg)\)", text):
        assert ElementTree.parse(tmp_path / "docs" / name).getroot().tag.endswith("svg")
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert min(columns) > 4
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_what_is_missing_is_said(tmp_path):
    text = written(tmp_path, everything(seeds=(0,)), [judge(0, 0.9)])
    # 23 variants and 3 reward models, 3 seeds; all but the self judge's 2 are there for seed 0
    assert "54 of 78 rows" in text and "0 of 26\n> variants have 3 seeds" in text
    assert "| 5.0 |" in text and "±" not in text.split("## All variants")[1].split("## The paper")[0]


def test_page_without_rows(tmp_path):
    assert "78 of 78 rows" in written(tmp_path, {})


def test_reading_rows(tmp_path):
    for each in (row("sft", 1, 3), judge(1, 0.6), rewarded("reward_bdhs", 1, 250)):
        (tmp_path / f"{each['variant']}.json").write_text(json.dumps(each))
    found, judges, rewards = read_rows(tmp_path)
    assert list(found) == ["sft"] and list(found["sft"]) == [1] and list(judges) == [1]
    assert list(rewards) == ["reward_bdhs"]


def test_a_judge_worse_than_chance_is_no_use():
    assert useful(judge(0, 0.7)) and not useful(judge(0, 0.3)) and not useful(judge(0, 0.7, apart=False))
    nothing = judge(0, None, apart=False)
    assert not useful(nothing)


def test_settings_that_one_side_does_not_know_do_not_count():
    assert same({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [2], "new": 3}})
    assert not same({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [3]}})
    assert not same({"online": None}, {"online": {"samples": 2}})


# ---- the script ------------------------------------------------------------------------------------


def test_rows_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    import study

    asked = []

    class Made(study.Study):
        def begin(self, base):
            pass

        def variant(self, name):
            asked.append((name, self.seed))
            return {k: v for k, v in row(name, self.seed, 5).items() if k != "settings"}

        def judged(self):
            asked.append(("judge", self.seed))
            return {"judged": judge(self.seed, 0.4, apart=False)["judged"], "seconds": {"whole": 1.0}}

    monkeypatch.setattr(study, "Study", Made)
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    places += ["--page", str(tmp_path / "docs" / "study.md"), "--seeds", "0", "1"]
    study.main([*places, "--only", "sft", "povid_style"])
    assert asked == [(name, seed) for seed in (0, 1) for name in ("sft", "povid_style")]
    assert "about" in capsys.readouterr().out
    study.main([*places, "--only", "povid_style", "online_dpo_self"])
    assert asked[4:] == [("judge", 0), ("judge", 1)]
    assert capsys.readouterr().out.count("left out") == 2
    changed = tmp_path / "results" / "sft-1.json"
    changed.write_text(changed.read_text().replace('"beta":0.3', '"beta":0.4'))
    study.main([*places, "--only", "sft", "povid_style"])
    assert asked[6:] == [("sft", 1)]
    assert "(`povid_style`) | 2 |" in (tmp_path / "docs" / "study.md").read_text()
