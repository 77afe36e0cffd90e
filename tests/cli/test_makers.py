"""`mllm-align data ...`: the makers of pairs, from the shell's side."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from chat_server import chat_server, said
from kept_programs import KEPT
from runs import MODEL, PAIRS, rows, write_pairs
from sft_data import sft_records

from mllm_align.data.readers import records_from

LENGTHS = """
def lengths(questions):
    return [[len(text) for text in each.responses] for each in questions]
"""


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with chat_server() as server:
        yield server


def test_corrupt(run, refused, chat, tmp_path):
    out = tmp_path / "corrupted.jsonl"
    chosen = {row["chosen"]: row["chosen"] + " So it is." for row in rows()}

    def reply(request, number):
        text = request["messages"][0]["content"][0]["text"]
        return said(chosen[text.rpartition("\nResponse: ")[2].partition("\nNew response:")[0]])

    chat.reply = reply
    command = ["data", "corrupt", PAIRS, "--writer.url", chat.url, "--out", out]
    status, told, err = run(*command)
    first, kinds, sent, last = told.splitlines()
    assert status == 0 and (first, last) == (
        f"corrupted.jsonl: {len(rows())} pairs of {len(rows())} records",
        str(out),
    )
    assert kinds.startswith("changes asked for: ") and sent.endswith(
        " requests sent, 0 answers were on disk"
    )
    assert err.endswith("read it with --data.allow-outside\n")
    (log,) = map(json.loads, (tmp_path / "corrupted.jsonl.log.jsonl").read_text().splitlines())
    assert log["pairs"] == len(rows()) and log["writer"]["url"] == chat.url
    assert "writer.name is given, but no writer" in refused(
        *command[:3], "--writer.name", "x", *command[5:]
    )
    assert "nobody is there to write" in refused(*command[:3], *command[5:])


def test_rewrite(run, refused, chat, tmp_path):
    data, out = write_pairs(tmp_path, rows(3)), tmp_path / "new.jsonl"

    def reply(request, number):
        text = request["messages"][0]["content"][0]["text"]
        response = text.rpartition("\nResponse: ")[2].partition("\nNew response:")[0]
        return said("Yes" if "Yes" in text else f"{response} So it is.")

    chat.reply = reply
    command = ["data", "rewrite", data, "--writer.url", chat.url, "--out", out]
    status, told, err = run(*command)
    assert (status, err) == (0, "")
    assert told.splitlines() == [
        "new.jsonl: 3 of 3 responses rewritten",
        "6 requests sent, 0 answers were on disk",
        str(out),
    ]
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["chosen"] for row in made] == [f"{row['chosen']} So it is." for row in rows(3)]
    (log,) = map(json.loads, (tmp_path / "new.jsonl.log.jsonl").read_text().splitlines())
    assert (log["event"], log["rewritten"]) == ("rewrite", 3)
    assert "nobody is there to write" in refused(*command[:3], *command[5:])


def test_pair(run, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lengths.py").write_text(LENGTHS)
    data, out = write_pairs(tmp_path, rows(4)), tmp_path / "made.jsonl"
    texts = [["Tuku der.", f"Faza {row['chosen']} manki."] for row in rows(4)]
    ids = [record.id for record in records_from(data)]
    lines = [{"index": i, "id": ids[i], "responses": each} for i, each in enumerate(texts)]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["data", "pair", "judge", "--data", data, "--out", out, "--annotator", "scorer"]
    command += ["--annotator.function", "lengths:lengths"]
    status, told, err = run(*command, "--responses", tmp_path / "tiny.jsonl")
    assert (status, err) == (0, "") and told.splitlines()[0] == f"starting {out}"
    assert told.splitlines()[1] == "4 pairs of 4 records" and told.splitlines()[-1] == str(out)
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["chosen"] for row in made] == [each[1] for each in texts]
    assert {row["rejected_model"] for row in made} == {"tiny"} and made[0]["rejected_score"] == 9
    (log,) = map(json.loads, (tmp_path / "made.jsonl.log.jsonl").read_text().splitlines())
    assert (log["event"], log["pairs"], log["annotator"]["kind"]) == ("pair", 4, "scorer")
    out = tmp_path / "new" / "made.jsonl"
    command[command.index("--out") + 1] = out
    assert "tiny.jsonl: has 4 lines for 3 records" in refused(
        *command, "--data.max-records", 3, "--responses", tmp_path / "tiny.jsonl"
    )
    assert "data pair needs --model" in refused(*command[:7], "--annotator", "judge")
    assert "data pair needs a config first" in refused(*command[:2], *command[3:])


def test_what_retrieve_refuses(refused, tmp_path):
    data, out = sft_records(tmp_path), tmp_path / "out.jsonl"
    command = ["data", "retrieve", data, "--model", MODEL, "--out", out]
    assert "--neighbours is 99" in refused(*command, "--neighbours", 99)
    assert "absent" in refused(*command[:4], tmp_path / "absent", *command[5:])


@pytest.mark.slow
def test_retrieve(run, tmp_path):
    data, out = sft_records(tmp_path), tmp_path / "out.jsonl"
    command = ["data", "retrieve", data, "--model", MODEL, "--out", out, "--neighbours", 2]
    status, told, err = run(*command)
    first, second, last = told.splitlines()
    assert (status, err, last) == (0, "", str(out)) and second.startswith("cosine of the nearest")
    images = len({row["images"][0] for row in rows(4)})
    assert first == f"4 of 4 records; {images} images, of which {images} were indexed now"
    made = [json.loads(line) for line in out.read_text().splitlines()]
    for row in made:
        assert row["rejected_images"] == row["neighbour_images"][:1] != row["images"]
        assert len(row["neighbour_images"]) == len(row["neighbour_similarity"]) == 2
    before = out.read_bytes()
    status, told, _ = run(*command)
    assert "of which 0 were indexed now" in told and out.read_bytes() == before


@pytest.mark.slow
def test_neighbour_images_mislead_a_model_and_its_pairs_are_read(run, tmp_path):
    data, found, out = sft_records(tmp_path), tmp_path / "found.jsonl", tmp_path / "pairs.jsonl"
    assert run("data", "retrieve", data, "--model", MODEL, "--out", found, "--neighbours", 2)[0] == 0
    argv = ["bdhs", "bdhs", "--model", MODEL, "--data", found, "--out", out, "--distortion", "retrieved"]
    argv += ["--similarity", "lexical", "--iterations", 2, "--sentence-tokens", 8, "--batch-size", 4]
    assert run(*argv, "--sampling.max-tokens", 8)[0] == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert made and all(len(row["rejected_images"]) == 1 for row in made)
    assert [len(each.rejected_images) for each in records_from(out)] == [1] * len(made)


@pytest.mark.slow
def test_an_index_goes_on_after_a_kill(tmp_path):
    data, out = write_pairs(tmp_path, rows()), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "mllm_align.cli", "data", "retrieve", str(data), "--model", str(MODEL)]
    command += ["--out", str(out), "--neighbours", "2", "--batch-size", "1"]
    entries = tmp_path / "out.index" / "entries"
    with subprocess.Popen(command, env=os.environ | KEPT) as first:
        deadline = time.monotonic() + 100
        while not (entries.exists() and entries.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.001)
        first.send_signal(signal.SIGKILL)
    assert not out.exists() and entries.stat().st_size
    done = subprocess.run(command, env=os.environ | KEPT, capture_output=True, text=True, check=True)
    count = len(entries.read_bytes())
    assert "were indexed now" in done.stdout and len(records_from(out)) == len(rows()) and count
