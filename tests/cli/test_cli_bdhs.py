"""`mllm-align bdhs`."""

import json
from pathlib import Path

import pytest
from runs import MODEL, PAIRS, rows, write_pairs
from sft_data import sft_records

CONFIGS = Path(__file__).parents[2] / "configs"

SHORT = ("--sampling.max-tokens", 8)


BDHS = CONFIGS / "bdhs.py"


LEXICAL = ("--similarity", "lexical", "--iterations", 2, "--sentence-tokens", 8, *SHORT)


def test_bdhs_makes_pairs(run, refused, tmp_path, scripted):
    data, out = sft_records(tmp_path), tmp_path / "pairs.jsonl"
    argv = ("bdhs", BDHS, "--model", MODEL, "--data", data, "--out", out, *LEXICAL)
    status, told, said = run(*argv)
    assert (status, said) == (0, "")
    begun, first, second = told.splitlines()
    assert begun == f"starting {out}"
    assert first == f"4 pairs in {out}; share that differs enough after"
    assert [each.split(": ")[0] for each in second.split("  ")] == ["try 1", "try 2"]
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [pair["index"] for pair in pairs] == list(range(4))
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert {p.name for p in tmp_path.iterdir()} == {
        "images",
        "records.jsonl",
        "pairs.jsonl",
        "pairs.jsonl.log.jsonl",
    }
    before = out.read_bytes()
    again = told.replace(begun, f"{out} is finished: nothing to do")
    assert run(*argv) == (0, again, "") and out.read_bytes() == before
    assert "exists and is not this job's output" in refused(*argv, "--seed", 1)

    for part in (0, 1):
        status, told, _ = run(*argv, "--shard", f"{part}/2")
        assert status == 0 and f"\n2 pairs in {tmp_path}/pairs-0000{part}-of-00002.jsonl;" in told


def test_pairs_of_a_model_can_be_read_back(run, tmp_path):
    data, out = sft_records(tmp_path), tmp_path / "pairs.jsonl"
    argv = ("bdhs", BDHS, "--model", MODEL, "--data", data, "--out", out, *LEXICAL, "--iterations", 1)
    assert run(*argv, "--batch-size", 4)[0] == 0
    assert run("inspect", "--model", MODEL, "--data", out, "--index", 3)[0] == 0


@pytest.mark.slow
def test_pairs_of_a_trained_model_can_be_trained_on(run, tmp_path, config_file):
    data = sft_records(tmp_path)
    training = ("train", config_file, "--model", MODEL, "--steps", 1)
    assert run(*training, "--data", write_pairs(tmp_path, rows()), "--out", tmp_path / "first")[0] == 0
    argv = ("bdhs", BDHS, "--model", tmp_path / "first", "--data", data, "--out", tmp_path / "made.jsonl")
    assert run(*argv, *LEXICAL)[0] == 0
    (pair, *_) = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert pair["bdhs"]["trained"] is not None
    assert run(*training, "--data", tmp_path / "made.jsonl", "--out", tmp_path / "second")[0] == 0


@pytest.mark.parametrize(
    "argv, said",
    [
        ((), "bdhs needs a config first"),
        (("--model", "x"), "bdhs needs a config first"),
        (("absent.py",), "config file absent.py is not there"),
        ((BDHS,), "bdhs needs --model, --data, --out;"),
        (
            (BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.jsonl", "--shard", "2/2"),
            "give part/parts",
        ),
        (
            (BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.jsonl", "--mask-rat", 1),
            "mean --mask-rate?",
        ),
        ((BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.txt"), "ends in .jsonl"),
        ((BDHS, "--model", "absent", "--data", PAIRS, "--out", "o.jsonl"), "absent"),
        ((BDHS, "--model", MODEL, "--data", "d.jsonl", "--out", "o.jsonl", *LEXICAL), "no such file"),
        (
            (BDHS, "--model", MODEL, "--data", PAIRS, "--out", "o.jsonl", "--similarity", "/no/folder"),
            "lexical",
        ),
    ],
    ids=lambda value: " ".join(map(str, value[1:])) if isinstance(value, tuple) else "",
)
def test_bdhs_refuses(refused, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused("bdhs", *argv)
    assert not list(tmp_path.iterdir())
