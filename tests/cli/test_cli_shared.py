"""Outputs of all verbs: one writer, whole or not at all."""

import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import MODEL, PAIRS, bundle
from sft_data import sft_records

from mllm_align.locks import alone

CONFIGS = Path(__file__).parents[2] / "configs"

SHORT = ("--sampling.max-tokens", 8)


BDHS = CONFIGS / "bdhs.py"


LEXICAL = ("--similarity", "lexical", "--iterations", 2, "--sentence-tokens", 8, *SHORT)


def test_places_that_cannot_be_written(refused, tmp_path, config_file):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("dear")
    (folder / "kept").mkdir(parents=True)
    scoring = ("score", "--model", MODEL, "--data", PAIRS, "--out")
    assert "can't write" in refused(*scoring, file / "scores")
    assert "folder" in refused(*scoring, folder)
    training = ("train", config_file, "--model", MODEL, "--data", PAIRS, "--out")
    assert "can't write" in refused(*training, file / "run")
    assert "is a file" in refused(*training, file)
    assert "holds other files" in refused(*training, folder)
    assert "something else" in refused("quickstart", "--out", folder)
    assert file.read_text() == "dear" and [p.name for p in folder.iterdir()] == ["kept"]
    assert "is no run folder" in refused("export", "--run", folder, "--out", tmp_path / "aligned")


@pytest.mark.parametrize(
    "verb, name, argv",
    [
        ("train", "run", ["CONFIG", "--model", MODEL, "--data", PAIRS]),
        ("score", "scores.jsonl", ["--model", MODEL, "--data", PAIRS]),
        ("generate", "said.jsonl", ["--model", MODEL, "--data", PAIRS]),
        ("bdhs", "pairs.jsonl", ["BDHS", "--model", MODEL, "--data", PAIRS, "--similarity", "lexical"]),
        ("judge", "judged.json", ["CONFIG", "--model", MODEL, "--data", PAIRS]),
        ("export", "folder", ["--run", "nowhere"]),
        ("quickstart", "quick", []),
    ],
)
def test_an_output_has_one_writer(refused, tmp_path, config_file, verb, name, argv):
    if verb == "judge":
        config_file = CONFIGS / "judge.py"
    files = {"CONFIG": config_file, "BDHS": CONFIGS / "bdhs.py"}
    with alone(tmp_path / name):
        line = refused(verb, *[files.get(word, word) for word in argv], "--out", tmp_path / name)
    assert f"{name}: is in use by process {os.getpid()} on " in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_a_result_does_not_replace_its_data(refused, tmp_path, verb):
    data = sft_records(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(data)
    before = data.read_bytes()
    for out in (data, tmp_path / "link.jsonl"):
        line = refused(verb, "--model", MODEL, "--data", data, "--out", out)
        assert "is the data file itself; give another --out" in line
        assert data.read_bytes() == before


@pytest.mark.parametrize("verb", ["score", "generate", "bdhs"])
def test_numbers_that_are_not_finite_end_with_status_3(run, tmp_path, monkeypatch, verb):
    """The records are named, and all files are as before."""
    broken = replace(bundle(), params=jax.tree.map(lambda x: x * np.float32("nan"), bundle().params))
    monkeypatch.setattr("mllm_align.models.bundle.load", lambda *_: broken)
    folder = tmp_path / "out"
    folder.mkdir()
    data = sft_records(tmp_path) if verb == "bdhs" else PAIRS
    words = {"score": (), "generate": SHORT, "bdhs": (BDHS, *LEXICAL, "--batch-size", 4)}[verb]
    if verb != "bdhs":  # it refuses what stands there
        (folder / "made.jsonl").write_text("before")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = (verb, *words, "--model", MODEL, "--data", data, "--out", folder / "made.jsonl")
    status, told, said = run(*argv)
    began = f"starting {folder / 'made.jsonl'}\n" if verb == "bdhs" else ""
    assert (status, told) == (3, began) and said.count("\n") == 1
    what, ids = ("log-probs" if verb == "score" else "logits"), ("0, 1, 2, 3, 4, ...", 8)
    ids = ("0, 1, 2, 3", 4) if verb == "bdhs" else ids
    assert f"error: {what} are not finite for {ids[1]} of {ids[1]} records: {ids[0]}; " in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "verb, options, said",
    [
        ("score", ["--batch-size", 10**9], "batch_size is 1000000000; it must be from 1 to 65536"),
        ("score", ["--batch-size", 60000], "batch_size is 60000, and the data have 8 records"),
        ("generate", ["--samples", 10**9], "samples is 1000000000; it must be from 1 to 1024"),
        ("generate", ["--seed", 2**70], "seed is 1180591620717411303424"),
        ("generate", ["--sampling.max-tokens", 10**12], "sampling.max_tokens is 1000000000000"),
    ],
)
def test_huge_numbers_are_refused(refused, tmp_path, verb, options, said):
    line = refused(verb, "--model", MODEL, "--data", PAIRS, "--out", tmp_path / "out.jsonl", *options)
    assert said in line
