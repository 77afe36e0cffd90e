"""Rows to records: every accepted form, every refusal."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import assert_refusal

from mllm_align.data.images import image_size
from mllm_align.data.records import Message, Part, Record, parse_record
from mllm_align.errors import InputError

IMAGE = {"type": "image"}
PIXELS = Image.new("RGB", (3, 2))
BASE = {"images": ["a.png"], "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


def text(value):
    return {"type": "text", "text": value}


def turn(role, content):
    return {"role": role, "content": content}


def parse(
    row=None, responses=2, root: Path | None = Path("/data"), allow_outside=False, unpaired=False, **changes
) -> Record:
    row = {**BASE, **changes} if row is None else row
    return parse_record(
        row,
        index=3,
        where="pairs.jsonl record",
        root=root,
        allow_outside=allow_outside,
        responses=responses,
        unpaired=unpaired,
    )


def chat(record):
    return [message.chat() for message in record.messages]


def assert_refused(*words, **arguments):
    assert_refusal(lambda: parse(**arguments), "pairs.jsonl record 3", *words)


def test_plain_strings():
    record = parse()
    assert record.id == "3" and record.where == "pairs.jsonl record 3"
    assert record.responses == ("A cat.", "A dog.")
    assert chat(record) == [turn("user", [IMAGE, text("What is it?")])]
    assert record.images[0].path == Path("/data/a.png")
    assert record.images[0].where == "pairs.jsonl record 3, images[0]"


def test_trl_rows_with_the_nulls_of_arrow():
    image = {"type": "image", "text": None, "index": None, "url": None}
    words = {"type": "text", "text": "What is it?", "url": None}
    record = parse(
        images=[{"bytes": b"x", "path": None}],
        image=None,
        messages=None,
        prompt=[turn("user", [image, words])],
        chosen=[turn("assistant", [text("A "), text("cat.")])],
        rejected=[turn("assistant", "A dog.")],
        score=7,
    )
    assert record.responses == ("A cat.", "A dog.")
    assert chat(record) == [turn("user", [IMAGE, text("What is it?")])]
    assert record.images[0].data == b"x"


def test_history_and_messages():
    history = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello.")]
    row = {**BASE, "messages": [*history, turn("user", "What is it?")]}
    del row["prompt"]
    record = parse(row)
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "user"]
    # Images without places go to the first user turn.
    assert record.messages[1] == Message("user", (Part(), Part("Hi")))
    assert record.messages[3].chat() == turn("user", [text("What is it?")])


def test_places_keep_their_turn_and_order():
    prompt = [turn("user", "Hi"), turn("assistant", "Yes?"), turn("user", [text("See "), IMAGE])]
    record = parse(prompt=prompt)
    assert [message.places for message in record.messages] == [0, 0, 1]
    assert chat(record)[2] == turn("user", [text("See "), IMAGE])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("<image>\r\nWhat?", [IMAGE, text("What?")]),
        ("<image>\n\nWhat?", [IMAGE, text("\nWhat?")]),
        ("One\n<image>\ntwo", [text("One\n"), IMAGE, text("two")]),
        ("See <image> here", [text("See "), IMAGE, text(" here")]),
        ("<image>", [IMAGE]),
    ],
)
def test_image_marks_in_text(prompt, parts):
    assert chat(parse(prompt=prompt)) == [turn("user", parts)]
    assert chat(parse(prompt=[turn("user", [text(prompt)])])) == [turn("user", parts)]


def test_several_images():
    marks = parse(images=["a.png", "b.png"], prompt="<image>\n<image>\nCompare.")
    assert chat(marks) == [turn("user", [IMAGE, IMAGE, text("Compare.")])]
    assert chat(parse(images=["a.png", "b.png"], prompt="Compare.")) == chat(marks)


@pytest.mark.parametrize("prompt", ["", "  ", [turn("user", [])]])
def test_empty_prompt_needs_an_image(prompt):
    assert parse(prompt=prompt).messages[0].places == 1
    assert_refused("prompt[0]", "empty", prompt=prompt, images=None)


@pytest.mark.parametrize("images", [None, []])
def test_text_only(images):
    record = parse(images=images)
    assert record.images == () and chat(record) == [turn("user", [text("What is it?")])]


@pytest.mark.parametrize(
    "changes",
    [
        {"images": ["a.png", "b.png"], "prompt": "<image> What?"},
        {"images": None, "prompt": "<image> What?"},
        {"images": ["a.png"], "prompt": [turn("user", [IMAGE, text("<image>")])]},
    ],
)
def test_places_and_images_must_match(changes):
    assert_refused("images", "image places", **changes)


def test_implicit_prompt():
    shared = [turn("user", "<image>\nWhat?"), turn("assistant", "A pet."), turn("user", "Which?")]
    row = {
        "image": "a.png",
        "chosen": [*shared, turn("assistant", "A cat.")],
        "rejected": [*shared, turn("assistant", [text("A dog.")])],
    }
    record = parse(row)
    assert record.responses == ("A cat.", "A dog.")
    assert [message.role for message in record.messages] == ["user", "assistant", "user"]
    assert record.messages[0].content == (Part(), Part("What?"))
    other = [turn("user", "<image>\nWho?"), *shared[1:], turn("assistant", "A dog.")]
    assert_refused("rejected", "differs from chosen", row={**row, "rejected": other})
    assert_refused("chosen", "ends with a user turn", row={**row, "chosen": shared})
    only = [turn("assistant", "A cat.")]
    assert_refused("prompt", "missing", row={**row, "chosen": only, "rejected": only})
    assert_refused("prompt", "missing", row={**row, "chosen": "A cat."})


def test_further_responses():
    record = parse({**BASE, "responses": ["A cow."]}, responses=3)
    assert record.responses == ("A cat.", "A dog.", "A cow.")


def test_further_responses_are_checked():
    row = dict(BASE)
    assert_refused("responses", "2 responses, 3 are needed", row=row, responses=3)
    assert_refused("responses[0]", "empty", row={**row, "responses": [" "]})
    assert_refused("responses[0]", "found int", row={**row, "responses": [1]})
    assert_refused("responses", "found str", row={**row, "responses": "A cow."})
    assert_refused("responses[0]", "<image>", row={**row, "responses": ["<image>"]})


def test_one_response_is_enough_for_tuning():
    asked = [turn("user", "What?"), turn("assistant", "A cat.")]
    for row in (
        {"prompt": "What?", "chosen": "A cat."},
        {"prompt": "What?", "completion": "A cat."},
        {"prompt": asked[:1], "completion": asked[1:]},
        {"messages": asked},
        {"chosen": asked},
    ):
        record = parse(row, responses=1)
        assert record.responses == ("A cat.",)
        assert chat(record) == [turn("user", [text("What?")])]
    assert parse({"messages": asked[:1], "chosen": "A cow."}, responses=1).responses == ("A cow.",)


def test_one_response_is_not_enough_for_preferences():
    asked = [turn("user", "What?"), turn("assistant", "A cat.")]
    assert_refused("chosen", "missing", row={"messages": asked})
    assert_refused("chosen", "missing", row={"prompt": "What?", "completion": "A cat."})
    assert_refused("chosen and completion", row={**BASE, "completion": "x"}, responses=1)
    assert_refused("chosen", "missing", row={"prompt": "What?"}, responses=1)
    assert_refused("messages", "user turn", row={"messages": asked[1:]}, responses=1)


def test_one_response_and_a_label_for_objectives_without_pairs():
    row = {"prompt": "What?", "completion": "A cat."}
    for label, wanted in ((True, ("A cat.", "")), (False, ("", "A cat."))):
        assert parse({**row, "label": label}, unpaired=True).responses == wanted
        assert parse({**row, "label": label}, responses=1).responses == ("A cat.",)
    assert parse(unpaired=True).responses == ("A cat.", "A dog.")
    assert parse({**BASE, "label": 3}).responses == ("A cat.", "A dog."), "a field of no meaning"
    assert_refused("one response and a label", "pair them, or train with", row={**row, "label": True})
    assert_refused("chosen", "missing", row=row, unpaired=True)
    assert_refused("label: found int", "give true or false", row={**row, "label": 1}, unpaired=True)
    assert_refused("both completion and chosen", row={**BASE, **row, "label": True}, unpaired=True)
    assert_refused("is empty", row={**row, "completion": " ", "label": False}, unpaired=True)


@pytest.mark.parametrize("field", ["chosen", "rejected"])
def test_faulty_responses(field):
    assert_refused(field, "missing", **{field: None})
    assert_refused(field, "empty", **{field: " \n"})
    assert_refused(field, "found int", **{field: 7})
    assert_refused(field, "<image>", **{field: "see <image>"})
    assert_refused(field, "surrogate", **{field: "\ud800"})
    assert_refused(field, "one assistant message", **{field: [turn("user", "x")]})
    assert_refused(field, "one assistant", **{field: [turn("assistant", "x")] * 2})
    assert_refused(f"{field}[0].content[0]", **{field: [turn("assistant", [IMAGE])]})
    assert_refused(field, "empty list", **{field: []})


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (7, ["prompt", "found int"]),
        ([], ["prompt", "empty list"]),
        (["x"], ["prompt[0]", "found str"]),
        ([turn("bot\nx", "x")], ["prompt[0].role", "'bot x'", "system, user, assistant"]),
        ([{"content": "x"}], ["prompt[0].role", "None"]),
        ([turn("user", None)], ["prompt[0].content", "null"]),
        ([turn("user", ["x"])], ["prompt[0].content[0]", "found str"]),
        ([turn("user", [{"type": "video"}])], ["prompt[0].content[0].type", "'video'"]),
        ([turn("user", [{"type": "text"}])], ["prompt[0].content[0].text", "null"]),
        ([turn("user", [{"type": "image", "image": "a.png"}])], ["images", "0 places", "are 1"]),
        ([turn("user", [{"type": "image_url", "image_url": {}}])], ["[0].image_url", "is missing"]),
        ([turn("user", [{"type": "text", "text": "x", "image": "a.png"}])], ["a text part with 'image'"]),
        ([turn("user", [{"type": "image", "image": "a", "url": "b"}])], ["both image and url"]),
        ([turn("assistant", [{"type": "image", "image": "a"}])], ["an image in a assistant turn"]),
        ([turn("system", "<image>"), turn("user", "x")], ["prompt[0]", "<image>"]),
        ([turn("system", [IMAGE]), turn("user", "x")], ["prompt[0].content[0]", "system"]),
        ([turn("system", "x")], ["prompt", "end with a user turn"]),
        ([turn("assistant", "x"), turn("user", "x")], ["prompt[0]", "alternate"]),
        ([turn("user", "x"), turn("user", "x")], ["prompt[1]", "alternate"]),
        ([turn("user", "x"), turn("system", "x")], ["prompt[1]", "system"]),
        ([turn("user", "x"), turn("assistant", "x")], ["prompt", "end with a user turn"]),
        (
            [turn("user", "x"), turn("assistant", "x <image>"), turn("user", "x")],
            ["prompt[1].content", "<image>"],
        ),
        (
            [turn("user", "x"), turn("assistant", " "), turn("user", "x")],
            ["prompt[1]", "assistant turn is empty"],
        ),
        (
            [turn("user", "x"), turn("assistant", "x"), turn("user", " ")],
            ["prompt[2]", "user turn is empty"],
        ),
    ],
)
def test_faulty_prompts(prompt, words):
    assert_refused(*words, prompt=prompt)


@pytest.mark.parametrize("name", ["video", "videos"])
def test_videos_are_refused(name):
    value = "a.mp4" if name == "video" else ["a.mp4"]
    assert_refused(f"record 3, {name}", "videos are not read", **{name: value})
    assert parse(**{name: None}) == parse() == parse(videos=[])
    part = {"type": "video", "path": "a.mp4"}
    assert_refused("found 'video'", prompt=[{"role": "user", "content": [part]}])


def test_contradictory_fields():
    assert_refused("both prompt and messages", messages="x")
    assert_refused("both images and image", image="a.png")


@pytest.mark.parametrize("row", [["x"], None, "x"])
def test_row_that_is_no_object(row):
    with pytest.raises(InputError, match=r"pairs\.jsonl record 3: found .*; give an object"):
        parse_record(row, index=3, where="pairs.jsonl record", root=None)


@pytest.mark.parametrize(("given", "found"), [("x y", "x y"), (5, "5"), (np.int64(6), "6")])
def test_ids(given, found):
    assert parse(id=given).id == found


@pytest.mark.parametrize("given", [True, 1.5, " ", ["x"]])
def test_faulty_ids(given):
    assert_refused("record 3, id", id=given)


@pytest.mark.parametrize("image", [PIXELS, np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.uint8)])
def test_images_in_memory(image):
    for row in ({**BASE, "images": [image]}, {**BASE, "images": None, "image": image}):
        assert image_size(parse(row, root=None).images[0]) == (3, 2)


def test_encoded_images():
    assert parse(images=[{"bytes": b"x", "path": "a.png"}]).images[0].data == b"x"
    assert parse(images=[{"bytes": None, "path": "a.png"}]).images[0].path == Path("/data/a.png")
    assert parse(images=[{"path": Path("b/a.png")}]).images[0].path == Path("/data/b/a.png")
    assert parse(images=None, image=b"x").images[0].where == "pairs.jsonl record 3, image"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, ["found null"]),
        (7, ["found int"]),
        ("", ["path is empty"]),
        ("http://a.org/b.png", ["download it first"]),
        ({"bytes": None, "path": None}, ["neither bytes nor path"]),
        ({"bytes": "QUJD"}, [".bytes", "4 characters", "holds no image"]),
        ({"bytes": "a.png"}, [".bytes", "is not base64"]),
        ({"bytes": 7}, [".bytes", "found int"]),
        ({"path": "https://a.org/b.png"}, ["download it first"]),
        (np.zeros((2, 3), np.float32), ["float32"]),
        ("a\0b.png", ["is no path"]),
    ],
)
def test_faulty_images(image, words):
    assert_refused("images[0]", *words, images=[image])


@pytest.mark.parametrize("images", ["a.png", {"path": "a.png"}, PIXELS])
def test_images_must_be_a_list(images):
    assert_refused("record 3, images", "list of images", images=images)


def test_paths_stay_in_the_root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    outside = tmp_path / "secret.png"
    outside.touch()
    (root / "link.png").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "a.png")
    for name in ("a.png", "sub/../a.png", "inner.png", str(root / "a.png")):
        assert parse(images=[name], root=root).images[0].path == root / "a.png"
    for name in ("../secret.png", "link.png", "sub/../../secret.png", str(outside)):
        assert_refused("images[0]", name[-9:], "--data.allow-outside", images=[name], root=root)
        record = parse(images=[name], root=root, allow_outside=True)
        assert record.images[0].path == outside


def test_root_may_be_a_symlink(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    record = parse(images=["a.png"], root=tmp_path / "link")
    assert record.images[0].path == tmp_path / "real" / "a.png"


def test_without_root_paths_are_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = parse(images=["../a.png", "b.png"], root=None)
    assert [image.path for image in record.images] == [
        tmp_path.parent / "a.png",
        tmp_path / "b.png",
    ]


def test_long_values_are_shortened():
    assert_refused("...", images=["http://a.org/" + "x" * 5000])


def test_a_prompt_is_needed_where_no_response_is():
    with pytest.raises(InputError, match="prompt: is missing"):
        parse_record({"images": []}, index=0, where="data record", root=None, responses=0)
