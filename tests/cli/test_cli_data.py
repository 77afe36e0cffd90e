"""Data sets as users name them on the command line: each format, splits, patterns, what is left out."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run
from goldens import FIXTURES
from published import ROWS, completion, llavarlhf, png, sharegpt, vlfeedback
from runs import MODEL, PAIRS, TINY, bundle, compiling, events, one_device, rows

from mllm_align.config import Config, DataConfig, from_json, to_json
from mllm_align.training import inputs, loop

assert compiling and run  # fixtures


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr("mllm_align.models.bundle.make_mesh", one_device)


@pytest.fixture
def inspect(run):
    """The record that `inspect --json` shows, and what it says besides; or the one line of its refusal."""

    def inspect(data, *options):
        status, out, err = run("inspect", "--model", MODEL, "--data", data, "--json", *options)
        if status:
            *before, line = err.splitlines()
            assert status == 2 and line.startswith("mllm-align: error: ") and not out
            assert all(each.startswith("left out of ") for each in before)
            return line
        return json.loads(out), err

    return inspect


def write(folder, *rows, name="pairs.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.png").write_bytes(png(30, 20))
    return folder / name


def text(entries):
    return "".join(entry["text"] for entry in entries)


@pytest.mark.parametrize("name", ROWS)
def test_each_format(inspect, tmp_path, name):
    row = ROWS[name]()
    (tmp_path / "a.png").write_bytes(png(30, 20))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    told, said = inspect(tmp_path / "pairs.parquet")
    assert told["where"] == "pairs.parquet record 0" and not said
    assert len(told["images"]) == 1 and told["prefix_tokens"] > 16
    assert [text(r).count("cat") for r in told["responses"]] == [1, 0]
    assert inspect(tmp_path / "pairs.parquet", "--data.format", name) == (told, said)
    other = "povid" if name != "povid" else "rlhfv"
    assert "pairs.parquet record 0, " in inspect(tmp_path / "pairs.parquet", "--data.format", other)


def test_conversations_for_sft(inspect, tmp_path):
    told, _ = inspect(write(tmp_path / "sft", sharegpt()), "--responses", 1)
    assert len(told["responses"]) == 1 and "cat" in text(told["responses"][0])
    assert "rejected: is missing" in inspect(tmp_path / "sft" / "pairs.jsonl")


def test_what_is_left_out_is_told(run, inspect, tmp_path):
    three = vlfeedback(completion("A cat.", "5"), completion("A cow.", "3"), completion("A dog.", "1"))
    tie = vlfeedback(completion("A cat.", "5"), completion("A cow.", "5"))
    data = write(
        tmp_path / "data", tie, three, vlfeedback(completion("A cat.", "N/A"), completion("x", "1"))
    )
    told, said = inspect(data)
    assert told["where"] == "pairs.jsonl record 1" and told["id"] == "v1"
    counts = "1 response without a number for each rating, 1 prompt with fewer than two rated responses"
    assert said == f"left out of {data}: 1 tie, {counts}\n"
    assert "has records 0 to 0" in inspect(data, "--index", 1)
    assert inspect(data, "--data.pairs", "all", "--index", 2)[0]["id"] == "v1-2"


@pytest.mark.slow
def test_scores_count_the_records_that_are_left(run, tmp_path):
    out = tmp_path / "scores.jsonl"
    data = write(tmp_path / "data", llavarlhf(0), llavarlhf(1), llavarlhf(2))
    status, told, said = run("score", "--model", MODEL, "--data", data, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 0 and "2 records scored" in told and said == f"left out of {data}: 1 tie\n"
    assert [line["index"] for line in lines] == [0, 1]
    assert lines[0]["chosen_logp"] == pytest.approx(lines[1]["rejected_logp"], abs=1e-4)


def test_splits_and_patterns(inspect, tmp_path):
    shutil.copytree(FIXTURES / "images", tmp_path / "data" / "images")
    for name, row in zip(("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"), rows(), strict=False):
        (tmp_path / "data" / name).write_text(json.dumps(row))
    line = inspect(tmp_path / "data")
    assert "data: holds several splits: test, train; name one with --data.split" in line
    assert (
        inspect(tmp_path / "data", "--data.split", "train", "--index", 1)[0]["where"]
        == "train-1.jsonl record 0"
    )
    assert "has records 0 to 1" in inspect(tmp_path / "data", "--data.split", "train", "--index", 2)
    assert "has no split 'dev': its splits are test, train" in inspect(
        tmp_path / "data", "--data.split", "dev"
    )
    assert inspect(f"{tmp_path}/data/te*.jsonl")[0]["where"] == "test-0.jsonl record 0"
    assert "no data file" in inspect(f"{tmp_path}/data/x*.jsonl")


def test_held_out_data_have_a_split_of_their_own(run, tmp_path, monkeypatch):
    read = []

    def prepare(bundle, data, config, *_, **__):
        read.append((str(data), config.split))
        if len(read) == 2:
            raise KeyboardInterrupt
        return None, [], []

    monkeypatch.setattr(inputs, "prepare", prepare)
    monkeypatch.setattr(inputs, "load", lambda *_: bundle())
    config = tmp_path / "config.py"
    text = "from mllm_align import Config\ndef get_config():\n    return Config(steps=1, lora=None)\n"
    config.write_text(text)
    options = [
        "--data.split",
        "train",
        "--data.eval-split",
        "test",
        "--eval-data",
        "data",
        "--out",
        tmp_path / "run",
    ]
    said = run("train", config, "--model", MODEL, "--data", "data", *options)
    assert said[0] == 130, said
    assert read == [("data", "train"), ("data", "test")]


def test_several_image_folders(inspect, tmp_path):
    names = [row["images"][0] for row in rows(2)]
    for folder, name in zip("ab", names, strict=True):
        (tmp_path / folder / "images").mkdir(parents=True)
        shutil.copy(PAIRS.parent / name, tmp_path / folder / name)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    roots = ("--data.image-root", tmp_path / "a", tmp_path / "b")
    for index, folder in enumerate("ab"):
        told, _ = inspect(tmp_path / "pairs.jsonl", *roots, "--index", index)
        assert f"{tmp_path.name}/{folder}/" in told["images"][0]["source"]
    assert "record 1, images[0]" in inspect(tmp_path / "pairs.jsonl", *roots[:2], "--index", 1)


def test_image_roots_of_configs():
    for given in ("a", ["a"], ("a",)):
        assert from_json(to_json(Config(data=DataConfig(image_root=given)))).data == DataConfig(
            image_root=("a",)
        )
    saved = to_json(Config())
    for old, new in ((None, ()), ("a", ("a",))):  # as earlier runs saved it
        saved["data"]["image_root"] = old
        assert from_json(saved).data == DataConfig(image_root=new)


@pytest.mark.slow
def test_a_runs_log_says_what_is_left_out(tmp_path):
    data = write(tmp_path / "data", *[llavarlhf(i % 3) for i in range(6)])
    loop.train(replace(TINY, steps=1), bundle(), data, tmp_path / "run")
    (start,) = events(tmp_path / "run", "start")
    assert (start["records"], start["left_out"]) == (4, {"tie": 2})
