"""The job that has rejected responses written, against a server on this machine and a model."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from chat_server import Reply, chat_server, said
from judges import answering, base  # noqa: F401
from published import png, trl
from refusals import assert_refusal
from test_items import read, written

from mllm_align.config.servers import Writer
from mllm_align.curation.corrupt import corrupt, told
from mllm_align.curation.writer import TRIES
from mllm_align.data.readers import records_from

COUNT = 12


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with chat_server() as server:
        server.reply = lambda request, number: said(changed(text_of(request)))
        yield server


@pytest.fixture
def data(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    return written(tmp_path, *(row(i) for i in range(COUNT)))


def row(number, **fields):
    fields = {"origin": "coco", "rejected_model": "other", "bdhs": {"iterations": 1}} | fields
    return trl(id=f"r{number}", chosen=f"Cat {number} sits here.", rejected="A dog.", **fields)


def text_of(request):
    return request["messages"][0]["content"][-1]["text"]


def about(text):
    return int(re.search(r"Response: Cat (\d+)", text)[1])


def changed(text):
    return f"Dog {about(text)} sits here."


def writer(chat, **settings):
    return Writer(**{"url": chat.url, "name": "llm", "retries": 0, "concurrency": 2} | settings)


def test_pairs_as_training_reads_them(chat, data, tmp_path):
    found = corrupt([data], tmp_path / "pairs.jsonl", writer(chat))
    assert {name: found[name] for name in ("records", "pairs", "left_out", "tries")} == {
        "records": COUNT,
        "pairs": COUNT,
        "left_out": {},
        "tries": {},
    }
    assert sorted(found["kinds"].values()) == [2, 2, 2, 3, 3] and (found["sent"], found["from_disk"]) == (
        12,
        0,
    )
    items = read(tmp_path / "pairs.jsonl")
    assert [item.record.id for item in items] == [f"r{i}" for i in range(COUNT)]
    assert [(i.chosen, i.rejected) for i in items][3] == ("Cat 3 sits here.", "Dog 3 sits here.")
    assert items[0].fields.keys() == {"origin", "corruption"}, "of the one before nothing"
    assert items[0].record.images[0].read() == png()
    kind = items[0].fields["corruption"].pop("kind")
    assert items[0].fields["corruption"] == {"tries": 1, "writer": "llm"} and found["kinds"][kind]
    assert len(records_from(tmp_path / "pairs.jsonl")) == COUNT
    assert all(len(request["messages"][0]["content"]) == 1 for request in chat.requests), "no image is sent"
    before = (tmp_path / "pairs.jsonl").read_bytes()
    again = corrupt([data], tmp_path / "pairs.jsonl", writer(chat))
    assert (again["sent"], again["from_disk"], len(chat.requests)) == (0, 12, 12)
    assert (tmp_path / "pairs.jsonl").read_bytes() == before


def test_what_can_not_be_used_is_asked_again_then_left_out(chat, data, tmp_path):
    def reply(request, number):
        text = text_of(request)
        if about(text) == 0:
            return said("I'm sorry, I can't.")
        if about(text) == 1 and "Attempt 1" not in text:
            return said("Here is the new response: " + changed(text))
        return Reply(status=400) if about(text) == 2 else said(changed(text))

    chat.reply = reply
    found = corrupt([data], tmp_path / "pairs.parquet", writer(chat))
    assert (found["pairs"], found["left_out"]) == (10, {"without an answer": 1, "refused": 1})
    assert found["tries"] == {"refused": TRIES, "with a heading": 1}
    assert sum(about(text_of(request)) == 0 for request in chat.requests) == TRIES
    items = {item.record.id: item for item in read(tmp_path / "pairs.parquet")}
    assert "r0" not in items and json.loads(items["r1"].fields["corruption"])["tries"] == 2
    line, *_, last = told(tmp_path / "pairs.parquet", found).splitlines()
    assert line == "pairs.parquet: 10 pairs of 12 records (left out: 1 without an answer, 1 refused)"
    assert last == f"{12 + TRIES} requests sent, 0 answers were on disk"


def test_the_budget_ends_the_work_and_what_came_is_kept(chat, data, tmp_path):
    out = tmp_path / "pairs.jsonl"
    assert_refusal(
        lambda: corrupt([data], out, writer(chat, budget=5)), "writer.budget", "5 requests are spent"
    )
    assert not out.exists() and len(chat.requests) == 5
    found = corrupt([data], out, writer(chat, budget=12))
    assert (found["sent"], found["from_disk"], len(chat.requests)) == (7, 5, 12)


def test_a_model_writes(base, answering, data, tmp_path):  # noqa: F811
    calls = answering(lambda each: changed(each.messages[0].text))
    model, out = Writer(model=str(base.folder.path), max_tokens=16), tmp_path / "pairs.jsonl"
    found = corrupt([data], out, model)
    assert (found["pairs"], found["sent"], len(calls[0]["records"])) == (COUNT, 12, 12)
    assert read(out)[5].rejected == "Dog 5 sits here."
    again = corrupt([data], out, model)
    assert (again["sent"], again["from_disk"], len(calls)) == (0, 12, 1)
    corrupt([data], out, Writer(model=str(base.folder.path), max_tokens=17))
    assert len(calls) == 2, "answers go by all that they follow from"
    long = Writer(model=str(base.folder.path), max_tokens=60_000)
    assert_refusal(lambda: corrupt([data], out, long), "12 too long for the writer", "take another writer")


def test_what_is_refused(chat, data, tmp_path):
    out = tmp_path / "pairs.jsonl"
    assert_refusal(lambda: corrupt([data], out, Writer()), "nobody is there to write", "--writer.url")
    assert_refusal(lambda: corrupt([data], tmp_path / "p.csv", writer(chat)), ".parquet or .jsonl")
    assert_refusal(lambda: corrupt([data], out, writer(chat), seed=-1), "--seed is -1")
    chat.reply = lambda request, number: said("")
    assert_refusal(lambda: corrupt([data], out, writer(chat)), "writer.name llm wrote", "12 empty")
    assert not out.exists()


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(chat, data, tmp_path):
    chat.reply = lambda request, number: said(changed(text_of(request)), wait=0.2)
    command = [sys.executable, "-m", "mllm_align.cli", "data", "corrupt", data, "--writer.url", chat.url]
    command += ["--writer.concurrency", "1", "--out", tmp_path / "pairs.jsonl"]
    with subprocess.Popen(command) as first:
        deadline = time.monotonic() + 60
        while len(chat.requests) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    assert not (tmp_path / "pairs.jsonl").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    asked = [about(text_of(request)) for request in chat.requests]
    assert sorted(set(asked)) == list(range(COUNT)) and len(asked) <= COUNT + 1, "the one on its way, twice"
    assert (
        f"{COUNT} pairs of {COUNT} records" in done.stdout and len(read(tmp_path / "pairs.jsonl")) == COUNT
    )
