"""Who writes: a server on this machine, or a model; asked once, and the answer is there."""

import pytest
from chat_server import Reply, chat_server, said
from judges import answering, base  # noqa: F401
from refusals import assert_refusal

from mllm_align.config.servers import Writer
from mllm_align.curation.writer import check_writer, open_writer
from mllm_align.data.records import Message, Part, Record
from mllm_align.errors import Interrupted


class Ask:
    def __init__(self, text):
        self.text = text
        self.record = Record("r", (Message("user", (Part(text),)),), (), (), "data")


def test_a_server(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with chat_server() as chat:
        chat.reply = lambda request, number: Reply(status=400) if "bad" in str(request) else said("Yes.")
        writer, out = Writer(url=chat.url, retries=0), tmp_path / "pairs.jsonl"
        with open_writer(writer, out) as asks:
            assert asks([Ask("one"), Ask("bad"), Ask("two")]) == ["Yes.", None, "Yes."]
            assert (asks.sent, asks.from_disk, asks.silence) == (3, 0, "without an answer")
        with open_writer(writer, out) as asks:
            assert asks([Ask("two")]) == ["Yes."] and (asks.sent, asks.from_disk) == (0, 1)
        assert len(chat.requests) == 3 and (tmp_path / "pairs.answers").is_dir()


def test_a_model(base, answering, tmp_path):  # noqa: F811
    calls = answering(lambda each: each.messages[0].text.upper())
    writer, out = Writer(model=str(base.folder.path), max_tokens=16), tmp_path / "pairs.jsonl"
    with open_writer(writer, out) as asks:
        assert asks([Ask("ab"), Ask("cd")]) == ["AB", "CD"] and asks.sent == 2
    with open_writer(writer, out) as asks:
        assert asks([Ask("ab"), Ask("ef")]) == ["AB", "EF"] and (asks.sent, asks.from_disk) == (1, 1)
    assert [len(call["records"]) for call in calls] == [2, 1]


def test_an_interrupt_says_what_is_kept(tmp_path):
    with (
        pytest.raises(Interrupted, match=r"are kept in .*pairs.answers"),
        open_writer(Writer(url="http://127.0.0.1:9"), tmp_path / "pairs.jsonl"),
    ):
        raise KeyboardInterrupt


def test_nobody():
    assert_refusal(lambda: check_writer(Writer()), "nobody is there to write", "--writer.url")
