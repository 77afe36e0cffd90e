"""`mllm-align data ...`: two words, from the shell's side."""

import json
import sys

import pytest
from runs import MODEL, PAIRS, rows


def test_the_verbs_of_data(run, refused):
    for word in ("--help", "-h"):
        status, told, _ = run("data", word)
        assert status == 0 and "\n  data stats " in told and "\n  data mix " in told
    assert "data is one of data show, data stats, data mix" in refused("data")
    assert "data needs" not in refused("data", "stat") and "data stats needs --files" in refused(
        "data", "stats"
    )


def test_stats(run, tmp_path):
    status, told, err = run("data", "stats", PAIRS, "--model", MODEL, "--out", tmp_path / "s.json")
    assert (status, err) == (0, "") and told.splitlines()[1].split() == ["records", str(len(rows()))]
    (found,) = json.loads((tmp_path / "s.json").read_text())["sets"].values()
    assert found["records"] == len(rows()) and found["token_limit"] == 8192


def test_mix(run, refused, tmp_path):
    out = tmp_path / "m.jsonl"
    status, told, err = run(
        "data", "mix", f"{PAIRS}:2", "--limit", 3, "--where", "images == 1", "--out", out
    )
    assert status == 0 and told.splitlines() == [f"pairs.jsonl: 3 of {len(rows())} records", str(out)]
    assert err == "it names images outside its folder: read it with --data.allow-outside\n"
    (log,) = map(json.loads, (tmp_path / "m.jsonl.log.jsonl").read_text().splitlines())
    assert (log["limit"], log["where"], log["sets"][0]["taken"]) == (3, "images == 1", 3)
    line = refused("data", "mix", f"{PAIRS}:-2", "--out", tmp_path / "n.jsonl")
    assert "--sets: '-2' in" in line and "is no weight" in line


def test_show(run, refused, tmp_path):
    status, told, err = run("data", "show", PAIRS, "--limit", 5, "--out", tmp_path / "page.html")
    sentence = f"{len(rows())} records of pairs.jsonl; 5 of them, drawn at random, are shown."
    assert (status, err) == (0, "") and told.splitlines() == [sentence, str(tmp_path / "page.html")]
    assert sentence in (tmp_path / "page.html").read_text()
    assert "data show needs --files, --out" in refused("data", "show")
    assert "--files needs a value" in refused("data", "show", "--files", "--out", tmp_path / "other.html")


def test_build(run, refused, tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    out = tmp_path / "built"
    assert run("data", "build", PAIRS, "--out", out) == (0, f"{len(rows())} records\n{out}\n", "")
    status, told, _ = run("inspect", "--model", MODEL, "--data", out, "--index", 3)
    assert status == 0 and "pairs-train.array_record-00000 record 3" in told
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "need the package tensorflow_datasets" in refused(
        "data", "build", PAIRS, "--out", tmp_path / "other"
    )
    assert "need the package tensorflow_datasets" in refused("data", "stats", out)


def test_select(run, refused, tmp_path):
    out = tmp_path / "chosen.parquet"
    command = ["data", "select", PAIRS, "--by", "difference", "--out", out]
    status, told, err = run(*command, "--keep", 3, "--lowest")
    first, last = told.splitlines()
    assert (status, err, last) == (0, "", str(out))
    assert first.startswith(f"3 of {len(rows())} records, difference_score ")
    (log,) = map(json.loads, (tmp_path / "chosen.parquet.log.jsonl").read_text().splitlines())
    assert (log["by"], log["keep"], log["lowest"], log["kept"]) == ("difference", "3", True, 3)
    assert "--keep: is 900, and there are" in refused(*command, "--keep", 900)


def test_select_by_domains(run, tmp_path):
    out = tmp_path / "between.jsonl"
    command = ["data", "select", PAIRS, "--by", "domains", "--model", MODEL, "--domains", 2, "--out", out]
    status, told, _ = run(*command, "--keep", 3)
    assert status == 0 and told.startswith(f"3 of {len(rows())} records, domains_score ")
    (log,) = map(json.loads, (tmp_path / "between.jsonl.log.jsonl").read_text().splitlines())
    assert sum(log["domain_sizes"]) == len(rows()) and (log["by"], log["domains"]) == ("domains", 2)


def test_flip(run, refused, tmp_path):
    texts = {"Be brief.": "A cup.", "Say all.": "A cup and a dog."}
    lines = [
        {"prompt": "What?", "preferences": {"user": p}, "completion": text} for p, text in texts.items()
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "pairs.jsonl"
    status, told, err = run("data", "flip", tmp_path / "p.jsonl", "--out", out)
    assert (status, err) == (0, "") and told.splitlines() == ["2 pairs of 2 records in 1 groups", str(out)]
    (log,) = map(json.loads, (tmp_path / "pairs.jsonl.log.jsonl").read_text().splitlines())
    assert (log["event"], log["pairs"], log["seed"]) == ("flip", 2, 0)
    assert "preferences" in refused("data", "flip", PAIRS, "--out", tmp_path / "none.jsonl")
