"""The job that has chosen responses rewritten and reviewed, against a server on this machine."""

import re

import pytest
from chat_server import Reply, chat_server, said
from published import trl
from refusals import assert_refusal
from test_items import read, written

from mllm_align.config.servers import Writer
from mllm_align.curation.rewrite import rewrite, told

COUNT = 5


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with chat_server() as server:
        server.reply = lambda request, number: said(answer(request))
        yield server


@pytest.fixture
def data(tmp_path):
    rows = (
        trl(id=f"r{i}", images=[], chosen=f"Cat {i} sits here.", rejected="A dog.", origin="coco")
        for i in range(COUNT)
    )
    return written(tmp_path, *rows)


def text_of(request):
    return request["messages"][0]["content"][-1]["text"]


def about(request):
    return int(re.search(r"Response: Cat (\d+)", text_of(request))[1])


def is_review(request):
    return "Yes" in text_of(request)


def answer(request):
    return "Yes\nIt is." if is_review(request) else f"Here sits cat {about(request)}."


def writer(chat, **settings):
    return Writer(**{"url": chat.url, "name": "llm", "retries": 0} | settings)


def test_what_is_approved_takes_the_place(chat, data, tmp_path):
    out = tmp_path / "new.jsonl"
    found = rewrite([data], out, writer(chat))
    assert (found["records"], found["rewritten"], found["kept"], found["sent"]) == (5, 5, {}, 10)
    item = read(out)[3]
    assert item.record.responses == ("Here sits cat 3.", "A dog.")
    how = {"approved": True, "writer": "llm", "tries": 1, "original": "Cat 3 sits here."}
    assert item.fields == {"origin": "coco", "rewrite": how}
    before = out.read_bytes()
    again = rewrite([data], out, writer(chat))
    assert (again["sent"], again["from_disk"], len(chat.requests)) == (0, 10, 10)
    assert out.read_bytes() == before


def test_what_is_not_stays_as_it_was(chat, data, tmp_path):
    def reply(request, number):
        text, which = text_of(request), about(request)
        if is_review(request):
            if which == 0:
                return said("No\nThe cat is gone.")
            return said("Perhaps.") if which == 1 else said(answer(request))
        if which == 2 and "Attempt 1" not in text:
            return said("")
        return Reply(status=400) if which == 3 else said(answer(request))

    chat.reply = reply
    found = rewrite([data], tmp_path / "new.parquet", writer(chat))
    assert found["rewritten"] == 2
    assert found["kept"] == {"not approved": 1, "review unread": 1, "without an answer": 1}
    assert found["tries"] == {"not approved": 3, "review unread": 3, "empty": 1}
    asked = [text_of(r) for r in chat.requests if about(r) == 0 and not is_review(r)]
    assert len(asked) == 3 and "The cat is gone" in asked[1]
    items = read(tmp_path / "new.parquet")
    assert [item.chosen for item in items][:3] == [
        "Cat 0 sits here.",
        "Cat 1 sits here.",
        "Here sits cat 2.",
    ]
    line, *_ = told(tmp_path / "new.parquet", found).splitlines()
    assert line == (
        "new.parquet: 2 of 5 responses rewritten (as they were: 1 not approved, 1 review unread, "
        "1 without an answer)"
    )


def test_what_is_refused(chat, data, tmp_path):
    out = tmp_path / "new.jsonl"
    assert_refusal(lambda: rewrite([data], out, Writer()), "nobody is there to write")
    assert_refusal(lambda: rewrite([data], tmp_path / "p.csv", writer(chat)), ".parquet or .jsonl")
    chat.reply = lambda request, number: said("No" if is_review(request) else answer(request))
    assert_refusal(lambda: rewrite([data], out, writer(chat)), "is approved (5 not approved)")
    assert not out.exists()
