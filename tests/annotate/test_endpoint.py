"""The endpoint as an annotator, against a server on this machine that has every fault."""

import asyncio
import base64
import io
import json
import re
import resource
import shutil
import socket
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import numpy as np
import pytest
from chat_server import Reply, chat_server, said, shown
from PIL import Image, ImageChops, ImageOps

from mllm_align.annotate import endpoint as module
from mllm_align.annotate.endpoint import Endpoint, EndpointClient
from mllm_align.annotate.factory import Context
from mllm_align.annotate.pairwise import Asked
from mllm_align.annotate.verdict import Question, rank
from mllm_align.data.images import ImageSource, load_rgb
from mllm_align.data.records import Message, Part, Record
from mllm_align.errors import InputError

KEY = "sk-hidden/0123456789+abc"


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with chat_server() as server:
        yield server


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    return KEY


def picture(seed=0, size=(12, 9), mode="RGB"):
    """A picture of large patches, so that JPEG changes it little."""
    values = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


IMAGE = ImageSource(data=encoded(picture()))


def record(name="a", *images):
    images = images or (IMAGE,)
    messages = (Message("user", (*[Part()] * len(images), Part(f"What is in {name}?"))),)
    return Record(name, messages, (), images, f"pairs.jsonl record {name}")


def asked(*names):
    return [Asked(record(name), "good", "bad") for name in names]


def asker(chat, folder=None, process=0, pause=0.002, **settings):
    settings = {"url": chat.url, "timeout": 5.0, "retries": 3} | settings
    return EndpointClient(Endpoint(**settings), folder, process, pause)


def refused(asker, questions):
    """The one line of the error, after a look at all that a traceback would show."""
    with pytest.raises(InputError) as caught:
        asker(questions)
    assert KEY not in "".join(traceback.format_exception(caught.value)) and "\n" not in str(caught.value)
    return str(caught.value)


def in_turn(*replies):
    """The first reply to the first request, and so on; the last to all further ones."""
    return lambda request, number: replies[min(number, len(replies) - 1)]


def name_of(request):
    text = request["messages"][0]["content"][-1]["text"]
    return text.partition("What is in ")[2].partition("?")[0]


def on_disk(folder):
    return "".join(file.read_text() for file in sorted(folder.iterdir()))


# ---- good answers ------------------------------------------------------------------------------------


def test_what_is_sent(chat, key):
    ask = asker(chat, model="qwen-vl", max_tokens=17)
    assert ask(asked("a")) == ["Response 1"]
    (request,) = chat.requests
    assert {k: v for k, v in request.items() if k != "messages"} == {
        "model": "qwen-vl",
        "max_tokens": 17,
        "temperature": 0,
    }
    (turn,) = request["messages"]
    assert turn["role"] == "user" and turn["content"][-1] == {"type": "text", "text": asked("a")[0].text}
    assert chat.paths == ["/v1/chat/completions"]
    assert chat.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert chat.headers[0]["Content-Type"] == "application/json"
    assert (ask.sent, ask.from_disk, ask.failed, ask.retried) == (1, 0, 0, 0)


def test_answers_come_in_the_order_asked_and_no_key_is_sent_where_none_is_set(chat):
    chat.reply = lambda request, number: said(name_of(request), wait=0.05 if number % 3 == 0 else 0.0)
    names = [str(i) for i in range(12)]
    assert asker(chat, concurrency=4)(asked(*names)) == names
    assert not any("Authorization" in headers for headers in chat.headers)
    assert asker(chat)([]) == []


def test_a_slash_and_a_query_of_the_address_stay_where_they_belong(chat):
    asker(chat, url=chat.url + "/")(asked("a"))
    asker(chat, url=chat.url + "/?api-version=1")(asked("a"))
    assert chat.paths == ["/v1/chat/completions", "/v1/chat/completions?api-version=1"]


def parts(chat, *sources):
    """Media types and bytes of the images as they came to the server."""
    asker(chat)([Asked(record("a", *sources), "good", "bad")])
    urls = [part["image_url"]["url"] for part in chat.requests[-1]["messages"][0]["content"][:-1]]
    heads, _, data = zip(*(url.partition(";base64,") for url in urls), strict=True)
    return list(zip(heads, (base64.b64decode(each, validate=True) for each in data), strict=True))


def test_images_go_as_their_files_are(chat, tmp_path):
    kinds = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "GIF": "gif"}
    files = [encoded(picture(), kind) for kind in kinds]
    (tmp_path / "grey.png").write_bytes(encoded(picture(mode="L")))
    sources = [ImageSource(data=data) for data in files] + [ImageSource(path=tmp_path / "grey.png")]
    sent = parts(chat, *sources)
    assert [data for _, data in sent[:4]] == files
    assert [head for head, _ in sent[:4]] == [f"data:image/{kind}" for kind in kinds.values()]
    assert sent[4] == ("data:image/png", (tmp_path / "grey.png").read_bytes())


def test_images_that_servers_might_show_otherwise_go_as_png_of_what_the_policy_sees(chat):
    exif = Image.Exif()
    exif[0x0112] = 3
    clear = picture().convert("RGBA")
    clear.putalpha(picture(1, mode="L"))
    deep = Image.fromarray(np.linspace(0, 65535, 108).astype(np.uint16).reshape(9, 12))
    sources = [
        ImageSource(data=encoded(picture(), "BMP")),
        ImageSource.from_memory(picture()),
        ImageSource(data=encoded(picture(), "JPEG", exif=exif)),
        ImageSource(data=encoded(clear)),
        ImageSource(data=encoded(deep)),
        ImageSource(data=encoded(picture(mode="CMYK"), "JPEG")),
        ImageSource(data=encoded(picture(), "GIF", save_all=True, append_images=[picture(1)])),
    ]
    for (head, data), source in zip(parts(chat, *sources), sources, strict=True):
        assert head == "data:image/png"
        found = Image.open(io.BytesIO(data))
        assert found.mode == "RGB" and found.getexif() == {}
        assert ImageChops.difference(found, load_rgb(source)).getbbox() is None
    assert ImageChops.difference(load_rgb(sources[2]), ImageOps.flip(picture())).getbbox() is not None


def test_an_image_that_cannot_be_used_is_named(chat, tmp_path):
    source = ImageSource(path=tmp_path / "absent.png", where="pairs.jsonl record 3, images[0]")
    line = refused(asker(chat), [Asked(record("a", source), "good", "bad")])
    assert "record 3, images[0]" in line and "absent.png" in line and not chat.requests


# ---- faults that pass --------------------------------------------------------------------------------

GOOD = said("Response 1")
PASSING = {
    "slow": Reply(wait=5),
    "408": Reply(status=408),
    "409": Reply(status=409),
    "425": Reply(status=425),
    "429": Reply(status=429),
    "500": Reply("<html>oh", status=500),
    "503": Reply(status=503),
    "no JSON": Reply("oh no"),
    "half JSON": Reply('{"choices": ['),
    "empty": Reply(""),
    "not UTF-8": Reply(b'{"choices": "\xff"}'),
    "deep": Reply("[" * 100_000),
    "no choices": Reply('{"object": "chat.completion"}'),
    "zero choices": Reply('{"choices": []}'),
    "a list": Reply("[1]"),
    "content null": said(None),
    "content parts": said([{"type": "text", "text": "Response 1"}]),
    "an error as 200": Reply('{"error": {"message": "overloaded"}}'),
    "cut": said("Response 1", cut=True),
    "bad gzip": said("Response 1", headers={"Content-Encoding": "gzip"}),
    "trickle": said("Response 1", trickle=0.05),
}


def patience(fault):
    """Short only where that is the test: a busy machine is slow, too."""
    return 1.0 if fault in ("slow", "trickle") else 5.0


@pytest.mark.parametrize("fault", PASSING)
def test_one_fault_then_good(chat, fault):
    chat.reply = in_turn(PASSING[fault], GOOD)
    ask = asker(chat, timeout=patience(fault))
    assert ask(asked("a")) == ["Response 1"]
    assert (ask.sent, ask.retried, ask.failed) == (2, 1, 0)


@pytest.mark.parametrize("fault", ["slow", "trickle", "500", "content null", "cut"])
def test_a_fault_that_lasts_is_no_answer(chat, fault):
    chat.reply = lambda request, number: PASSING[fault] if name_of(request) == "b" else GOOD
    ask = asker(chat, timeout=patience(fault), retries=1)
    began = time.monotonic()
    assert ask(asked("a", "b", "c")) == ["Response 1", None, "Response 1"]
    assert time.monotonic() - began < 4
    assert (ask.sent, ask.retried, ask.failed) == (4, 1, 1)


def test_headers_that_trickle_are_cut_too(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    over = threading.Event()

    def serve(listening):
        connection, _ = listening.accept()
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n":
            if over.wait(0.03):
                break
            connection.send(bytes([byte]))
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        line = refused(EndpointClient(Endpoint(url=url, timeout=0.2, retries=0), None), asked("a"))
        over.set()
        thread.join(5)
    assert "no whole answer within 0.2 s" in line


def test_pauses_grow(chat):
    chat.reply = in_turn(Reply(status=500), Reply(status=500), Reply(status=500), GOOD)
    assert asker(chat, pause=0.08)(asked("a")) == ["Response 1"]
    pauses = np.diff(chat.times)
    assert len(pauses) == 3
    for pause, most in zip(pauses, (0.08, 0.16, 0.32), strict=True):
        assert most / 2 <= pause < most + 1


def test_retry_after_is_followed(chat, monkeypatch):
    chat.reply = in_turn(Reply(status=429, headers={"Retry-After": "0.4"}), GOOD)
    assert asker(chat)(asked("a")) == ["Response 1"]
    assert np.diff(chat.times)[0] >= 0.4
    monkeypatch.setattr(module, "LONGEST_WISH", 0.05)
    chat.reply = in_turn(*[GOOD] * 2, Reply(status=503, headers={"Retry-After": "3600"}), GOOD)
    assert asker(chat)(asked("a")) == ["Response 1"]
    assert 0.05 <= np.diff(chat.times)[-1] < 1


def test_what_retry_after_may_be():
    soon = datetime.now(UTC) + timedelta(seconds=20)
    assert module._wish("7") == 7 and module._wish("3600") == module._wish("1e99") == 60
    assert 15 < module._wish(format_datetime(soon, usegmt=True)) <= 20
    assert 15 < module._wish(format_datetime(soon.replace(tzinfo=None))) <= 20
    assert module._wish(format_datetime(soon - timedelta(days=1))) == 0
    for text in ("", "-3", "nan", "inf", "soon", "Mon, 99 Foo 99999 00:00:00 GMT"):
        assert module._wish(text) == 0


# ---- faults that end the run -------------------------------------------------------------------------


def test_nobody_listens(chat):
    with socket.create_server(("127.0.0.1", 0)) as once:
        url = f"http://127.0.0.1:{once.getsockname()[1]}/v1"
    ask = asker(chat, url=url, retries=2)
    line = refused(ask, asked("a", "b"))
    assert f"annotator.url {url}: no answer to any of 2 requests; the last problem: ConnectError" in line
    assert "the same command goes on" in line
    assert (ask.sent, ask.retried, ask.failed) == (6, 4, 2)


def test_a_server_that_is_down_is_given_up_before_all_is_tried(chat):
    chat.reply = in_turn(Reply("out of memory", status=500))
    line = refused(asker(chat, retries=0, concurrency=2), asked(*map(str, range(100))))
    assert "8 requests; the last problem: 500 out of memory" in line and len(chat.requests) <= 9


def test_one_answer_is_enough_to_go_on(chat):
    chat.reply = lambda request, number: GOOD if name_of(request) == "3" else Reply(status=500)
    answers = asker(chat, retries=0, concurrency=1)(asked(*map(str, range(20))))
    assert answers == [None] * 3 + ["Response 1"] + [None] * 16


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_shown(chat, key, status, tmp_path):
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {key}. " + "x" * 999}})
    chat.reply = in_turn(Reply(body, status=status))
    line = refused(asker(chat, tmp_path), asked("a"))
    assert f"refuses the key of the environment variable OPENAI_API_KEY ({status} Incorrect API" in line
    assert "provided: [key]" in line and len(line) < 600 and key not in on_disk(tmp_path)
    assert len(chat.requests) == 1


def test_a_missing_key_is_asked_for(chat):
    chat.reply = in_turn(Reply("Unauthorized", status=401))
    line = refused(asker(chat, key_variable="MY_KEY"), asked("a"))
    assert "the server wants a key (401 Unauthorized); set the environment variable MY_KEY" in line


@pytest.mark.parametrize("value", ["ab\ncd", "schlüssel", "a b"])
def test_a_key_that_no_header_holds_is_refused_without_being_shown(chat, monkeypatch, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(InputError, match=r"^OPENAI_API_KEY: holds a character that no key has") as caught:
        asker(chat)
    assert value not in str(caught.value)


def test_a_key_that_the_server_repeats_is_kept_nowhere(chat, key, tmp_path):
    bad = Reply(f"upstream said {key}", status=500)
    chat.reply = lambda request, number: said(f"Response 1: {key}") if number % 2 else bad
    assert asker(chat, tmp_path)(asked("a")) == ["Response 1: [key]"]
    assert "Response 1: [key]" in on_disk(tmp_path) and key not in on_disk(tmp_path)
    chat.reply = in_turn(bad)
    assert "upstream said [key]" in refused(asker(chat, retries=0), asked("b"))
    for body in (f"bad {key}", json.dumps({"detail": f"bad {key}"}).replace("/", r"\/")):
        chat.reply = in_turn(Reply(body, status=400))
        assert "bad [key]" in refused(asker(chat), asked("c"))


def test_a_word_for_no_key_stays_in_answers(chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    assert asker(chat)(asked("a")) == ["Response 1"]


@pytest.mark.parametrize(
    "status, told",
    [
        (400, "asked about pairs.jsonl record a: the server refuses this (400 no image); check"),
        (413, "leave the record out"),
        (422, "422 no image"),
        (404, "the server does not know this address or the model 'default' (404 no image); check"),
    ],
)
def test_refusals_end_a_run_in_which_nothing_was_answered(chat, status, told):
    chat.reply = in_turn(Reply('{"error": {"message": "no image"}}', status=status))
    ask = asker(chat, concurrency=1)
    assert told in refused(ask, asked(*"abcdefghijkl"))
    assert ask.sent == (1 if status == 404 else 8)


def test_settings_of_models_that_want_other_names(chat):
    asker(chat, limit_name="max_completion_tokens", temperature=None)(asked("a"))
    assert chat.requests[0]["max_completion_tokens"] == 256
    assert not {"temperature", "max_tokens"} & chat.requests[0].keys()
    with pytest.raises(InputError, match=r"^annotator\.temperature"):
        Endpoint(temperature=-1.0)


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_question_that_is_refused_is_one_without_an_answer(chat, tmp_path, status):
    """A filter of contents takes offence at some pictures: the others are worth going on for."""
    bad = Reply('{"error": {"message": "content_filter"}}', status=status)
    chat.reply = lambda request, number: bad if "x" in name_of(request) else said(name_of(request))
    ask = asker(chat, tmp_path, concurrency=1)
    assert ask(asked("x1", "a", "x2", "b")) == [None, "a", None, "b"]
    assert (ask.sent, ask.retried, ask.failed) == (4, 0, 2)
    many = [f"x{i}" for i in range(3, 15)]
    assert ask(asked(*many)) == [None] * 12  # the server has answered before
    again = asker(chat, tmp_path)
    assert again(asked(*many)) == [None] * 12 and again.sent == 12
    assert "record x" in refused(asker(chat), asked(*many))


def test_a_refusal_waits_for_what_is_on_its_way_and_for_nothing_else(chat, tmp_path):
    def reply(request, number):
        slow = said(name_of(request), wait=0.3)
        busy = Reply(status=429, headers={"Retry-After": "30"})
        return {"a": slow, "b": busy, "c": Reply(status=404, wait=0.15)}[name_of(request)]

    chat.reply = reply
    began = time.monotonic()
    ask = asker(chat, tmp_path)
    assert "does not know" in refused(ask, asked("a", "b", "c"))
    assert time.monotonic() - began < 2 and ask.sent == 3
    assert '"answer": "a"' in on_disk(tmp_path)


def test_the_key_follows_no_redirect(chat, key):
    with chat_server() as other:
        chat.reply = in_turn(Reply(status=307, headers={"Location": f"{other.url}/?k={key}"}))
        line = refused(asker(chat), asked("a"))
        assert "redirects to 'http://127.0.0.1" in line and "mend annotator.url" in line
        assert not other.requests and len(chat.requests) == 1


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///v1", "http://a b/v1", "http://[::1/v1", "http://h:99999/v1", "http://a..b/v1"],
)
def test_addresses_that_cannot_be_used(url):
    with pytest.raises(InputError, match=r"^annotator\.url: .*no usable address"):
        EndpointClient(Endpoint(url=url), None)


def test_secrets_in_a_query_are_not_shown(chat):
    with pytest.raises(InputError) as caught:
        EndpointClient(Endpoint(url="http://:0:0?key=abc"), None)
    assert "abc" not in str(caught.value)
    chat.reply = in_turn(Reply(status=404))
    assert "abc" not in refused(asker(chat, url=chat.url + "?key=abc"), asked("a"))


# ---- limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_than_concurrency_at_once(chat, most):
    chat.reply = lambda request, number: said(name_of(request), wait=0.04)
    names = [str(i) for i in range(12)]
    assert asker(chat, concurrency=most)(asked(*names)) == names
    assert chat.most_at_once == most


def test_the_budget_is_never_overspent_and_lasts_over_restarts(chat, tmp_path):
    chat.reply = lambda request, number: said(name_of(request), wait=0.02)
    names = [str(i) for i in range(20)]
    ask = asker(chat, tmp_path, budget=5, concurrency=4)
    line = refused(ask, asked(*names))
    assert line.startswith("annotator.budget: all 5 requests are spent; the answers so far are kept; raise")
    assert len(chat.requests) == ask.sent == 5 and on_disk(tmp_path).count("answer") == 5
    assert refused(asker(chat, tmp_path, budget=5), asked(*names)) == line
    assert asker(chat, tmp_path, budget=5)(asked(*names[:5])) == names[:5], "answers on disk are free"
    assert len(chat.requests) == 5
    ask = asker(chat, tmp_path, budget=20)
    assert ask(asked(*names)) == names
    assert (len(chat.requests), ask.sent, ask.from_disk) == (20, 15, 5)


def test_retries_count_against_the_budget(chat, tmp_path):
    chat.reply = in_turn(Reply(status=500))
    ask = asker(chat, tmp_path, budget=5, retries=9, concurrency=3)
    assert refused(ask, asked("a", "b", "c")).startswith("annotator.budget")
    assert len(chat.requests) == 5 and ask.retried == 2


def test_the_budget_is_of_each_process_and_counts_without_a_folder(chat, tmp_path):
    for process in (0, 1):
        ask = asker(chat, tmp_path, process, budget=1)
        assert ask(asked(str(process))) == ["Response 1"]
        assert refused(ask, asked("c")).startswith("annotator.budget")
    ask = asker(chat, budget=1)
    assert ask(asked("a")) == ask(asked("a")) == ["Response 1"]
    assert refused(ask, asked("b")).startswith("annotator.budget")


# ---- what is kept ------------------------------------------------------------------------------------


def test_answers_on_disk_are_not_asked_for_again(chat, tmp_path):
    chat.reply = lambda request, number: said(name_of(request) + ' "é 🙂\n\ud800')
    first = asker(chat, tmp_path / "new" / "folder")(asked("a", "b"))
    assert first == ['a "é 🙂\n?', 'b "é 🙂\n?']
    ask = asker(chat, tmp_path / "new" / "folder", url="http://127.0.0.1:1/elsewhere")
    assert ask(asked("b", "a")) == first[::-1]
    assert (ask.sent, ask.from_disk, len(chat.requests)) == (0, 2, 2)


def test_every_part_of_the_question_counts(chat, tmp_path):
    asker(chat, tmp_path)(asked("a"))
    others = [
        Asked(record("a"), "bad", "good"),
        Asked(record("b"), "good", "bad"),
        Asked(record("a", ImageSource(data=encoded(picture(1)))), "good", "bad"),
    ]
    asker(chat, tmp_path)(others)
    asker(chat, tmp_path, model="another")(asked("a"))
    asker(chat, tmp_path, max_tokens=9)(asked("a"))
    asker(chat, tmp_path, url=chat.url + "/", concurrency=2, timeout=9.0)(asked("a"))
    assert len(chat.requests) == 6
    source = ImageSource.from_memory(picture())
    asker(chat, tmp_path)([Asked(record("a", source), "good", "bad")])
    assert len(chat.requests) == 6, "the same picture in memory"


def test_what_is_asked_twice_is_sent_once(chat, tmp_path):
    ask = asker(chat, tmp_path)
    assert ask(asked("a", "b", "a", "a")) == ["Response 1"] * 4
    assert (len(chat.requests), ask.from_disk) == (2, 0)


def test_another_number_of_processes_finds_all_answers(chat, tmp_path):
    for process in range(3):
        asker(chat, tmp_path, process)(asked(str(process)))
    files = {file.name for file in tmp_path.iterdir()}
    assert {"answers-00000.jsonl", "answers-00001.jsonl", "answers-00002.jsonl"} < files
    ask = asker(chat, tmp_path)
    assert ask(asked("0", "1", "2")) == ["Response 1"] * 3 and ask.sent == 0


def test_no_answer_is_asked_for_again_in_the_next_run(chat, tmp_path):
    chat.reply = lambda request, number: Reply(status=500) if name_of(request) == "a" else GOOD
    assert asker(chat, tmp_path, retries=0)(asked("a", "b")) == [None, "Response 1"]
    assert asker(chat, tmp_path, retries=0)(asked("a", "b")) == [None, "Response 1"], (
        "as before, not an end"
    )
    chat.reply = in_turn(GOOD)
    assert asker(chat, tmp_path)(asked("a", "b")) == ["Response 1"] * 2


def test_a_half_line_is_cut_off_and_asked_for_again(chat, tmp_path):
    asker(chat, tmp_path)(asked("a", "b"))
    file = tmp_path / "answers-00000.jsonl"
    whole = file.read_bytes()
    for cut in (1, 20, len(whole) // 2 - 1):
        file.write_bytes(whole[:-cut])
        other = asker(chat, tmp_path, process=1)
        assert file.read_bytes() == whole[:-cut], "another process may be writing it"
        assert other._kept.answers == {json.loads(whole.split(b"\n")[0])["key"]: "Response 1"}
        before = len(chat.requests)
        ask = asker(chat, tmp_path)
        assert ask(asked("a", "b")) == ["Response 1"] * 2 and len(chat.requests) == before + 1
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "line", ["{oh", "[1]", '{"key": "a"}', '{"key": "a", "answer": null}', "", "3", b"\xff", "[" * 100_000]
)
def test_a_damaged_line_is_named(chat, tmp_path, line):
    good = b'{"key": "a", "answer": "b"}\n'
    data = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "answers-00003.jsonl").write_bytes(good + data + b"\n" + good)
    with pytest.raises(InputError, match=r"answers-00003\.jsonl line 2: this is no kept answer; delete"):
        asker(chat, tmp_path)


def test_a_full_disk_ends_the_run_and_leaves_whole_lines(chat, tmp_path):
    file, before = tmp_path / "answers-00000.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    ask = asker(chat, tmp_path, concurrency=1)
    ask(asked("a"))
    whole = file.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 30, before[1]))
    try:
        line = refused(ask, asked("b", "c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith(f"can't write {file}: ") and line.endswith(
        "; make room or check its permissions"
    )
    assert file.read_bytes() == whole
    assert ask(asked("a", "b", "c")) == asker(chat, tmp_path)(asked("a", "b", "c")) == ["Response 1"] * 3


def test_folders_that_cannot_be_used(chat, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        ask = asker(chat, folder)
        assert re.match(r"can't write .*file", refused(ask, asked("a"))) and not chat.requests
    (tmp_path / "answers-00000.jsonl").mkdir()
    with pytest.raises(InputError, match=r"^can't read .*answers-00000\.jsonl"):
        asker(chat, tmp_path)


def test_a_folder_that_vanishes_ends_the_run(chat, tmp_path):
    ask = asker(chat, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was asked"
    ask(asked("a"))
    shutil.rmtree(tmp_path / "run")
    assert "can't write" in refused(ask, asked("b"))


# ---- where it is called from -------------------------------------------------------------------------


def test_from_a_thread_and_from_a_running_loop(chat):
    ask, found = asker(chat), []
    threads = [threading.Thread(target=lambda n=n: found.extend(ask(asked(n)))) for n in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)

    async def notebook():
        return ask(asked("c"))

    assert found + asyncio.run(notebook()) == ["Response 1"] * 3 and len(chat.requests) == 3


# ---- as an annotator ---------------------------------------------------------------------------------


def question(name, *responses):
    return Question(record(name), responses)


def annotator(chat, **settings):
    annotator = Endpoint(url=chat.url, timeout=5.0, **settings).open(Context())
    annotator.ask._pause = 0.002
    return annotator


def best(request):
    first, second = shown(request)
    return "Response 1" if first < second else "Response 2"


def test_each_process_asks_about_its_own(chat):
    assert Endpoint.on_devices is False


def test_verdicts(chat):
    words = {
        "good": best,
        "first": lambda request: "**Response 1**\nIt is true.",
        "tie": lambda request: "Tie",
        "unclear": lambda request: "Both are fine.",
        "empty": lambda request: "",
        "three": best,
    }
    chat.reply = lambda request, number: said(words[name_of(request)](request))
    questions = [question(name, "b", "a") for name in words if name != "three"]
    questions += [question("three", "b", "c", "a"), question("good", "a", "a")]
    verdicts = rank(annotator(chat), questions)
    assert [v.outcome for v in verdicts] == [
        "ranked",
        "disagreement",
        "tie",
        "unparsable",
        "unparsable",
        "ranked",
        "identical",
    ]
    assert [(v.first, v.parsed) for v in verdicts[:4]] == [(1, 2), (2, 2), (0, 0), (0, 0)]
    assert verdicts[0].pair == (1, 0)
    assert verdicts[5].scores == (1, 0, 2) and verdicts[5].ranking == (2, 0, 1)
    assert len(chat.requests) == 5 * 2 + 6


def test_one_failure_fails_its_question_alone(chat):
    def reply(request, number):
        broken = name_of(request) == "2" and shown(request)[0] == "a"
        return Reply(status=500) if broken else said(best(request))

    chat.reply = reply
    asks = annotator(chat, retries=1)
    verdicts = rank(asks, [question(str(i), "a", "b") for i in range(5)])
    assert [v.outcome for v in verdicts] == ["ranked"] * 2 + ["failed"] + ["ranked"] * 2
    assert (asks.ask.failed, asks.ask.retried) == (1, 1)


def test_all_failing_ends_the_run(chat):
    chat.reply = in_turn(Reply("down for repair", status=503))
    with pytest.raises(InputError, match="no answer to any of 4 requests; the last problem: 503 down for"):
        rank(annotator(chat, retries=1), [question("a", "a", "b"), question("b", "a", "b")])


# ---- answers that are all needed -----------------------------------------------------------------------


def test_each_answer_is_told_of_as_soon_as_it_is_there(chat):
    told = {}
    chat.reply = lambda request, number: said(name_of(request)) if number < 2 else Reply(status=503)
    ask = asker(chat, retries=0, concurrency=1)
    names = ["a", "b", "a", "c", "b"]
    assert ask(asked(*names), told.__setitem__) == ["a", "b", "a", None, "b"]
    assert told == {0: "a", 1: "b", 2: "a", 4: "b"}
    assert ask(asked("b"), told.__setitem__) == ["b"] and told[0] == "b"


def test_one_answer_that_does_not_come_is_an_error_where_all_are_needed(chat):
    settings = Endpoint(url=chat.url, retries=0, concurrency=1)
    chat.reply = lambda request, number: Reply("busy", status=503) if number else said("Tie")
    line = refused(EndpointClient(settings, None, every=True), asked("a", "b"))
    assert "no answer to 1 requests; the last problem: 503 busy" in line
    line = refused(EndpointClient(settings, None, every=True), asked(*map(str, range(30))))
    assert "no answer to any of 8 requests" in line and len(chat.requests) == 10


def test_requests_that_are_spent_already(chat):
    settings = Endpoint(url=chat.url, budget=3, concurrency=1)
    line = refused(EndpointClient(settings, None, spent=2), asked("a", "b"))
    assert "all 3 requests are spent" in line and len(chat.requests) == 1
