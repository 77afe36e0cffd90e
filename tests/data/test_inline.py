"""Images as text: data URIs, base64, parts of messages; what is a path and what is not; several roots."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import assert_refusal

from mllm_align.data.images import image_size
from mllm_align.data.inline import is_image_text
from mllm_align.data.records import parse_record
from mllm_align.data.roots import Roots

BASE = {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")


def encoded(kind="PNG", width=5):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(width * 24, dtype=np.uint8).reshape(8, width, 3)).save(buffer, kind)
    return buffer.getvalue()


def b64(data, safe=False):
    return (base64.urlsafe_b64encode if safe else base64.b64encode)(data).decode()


def parse(root: Path | Roots | None = Path("/data"), **fields):
    return parse_record({**BASE, **fields}, index=3, where="pairs.jsonl record", root=root)


def refused(*words, **fields):
    message = assert_refusal(lambda: parse(**fields), *words)
    assert message.startswith("pairs.jsonl record 3")


# --- base64 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_base64_of_every_kind(kind):
    data = encoded(kind)
    lines = "\n".join(b64(data)[i : i + 76] for i in range(0, len(b64(data)), 76))
    forms = [b64(data), b64(data, safe=True), b64(data).rstrip("="), f" {lines}\n"]
    for text in forms:
        (source,) = parse(images=[text]).images
        assert source.data == data and image_size(source) == (5, 8)
        assert parse(image={"bytes": text, "path": "gone.png"}).images[0].data == data
        assert parse(images=[f"data:image/{kind.lower()};base64,{text}"]).images[0].data == data
    assert parse(image=f"DATA:;charset=utf-8;base64,{b64(data)}").images[0].data == data
    assert parse(image=[b64(data)]).images[0].where == "pairs.jsonl record 3, image[0]"


@pytest.mark.parametrize(
    "path",
    [
        "a.png",
        "/9j/a.png",
        "iVBORw0KGgo",
        "_9j_AAAA/BBBB",
        "R0lGODlh/photos/of/every/kind/and/size/there/is.gif",
        "Qk" + "A" * 60,
        "COCO/train2014/COCO_train2014_000000000009",
        "images/" + "a" * 200,
    ],
)
def test_paths_stay_paths(path):
    assert not is_image_text(path)
    found = parse(images=[path], root=Path("/")).images[0]
    assert found.path == Path("/", path) and found.data is None


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("data:image/png;base64,", ["0 bytes"]),
        ("data:image/png;base64,AA*A", ["not base64"]),
        ("data:image/png;base64,QUJD", ["holds no image"]),
        ("data:image/svg+xml,<svg/>", ["not in base64"]),
        ("data:,x", ["not in base64"]),
        ("data:image/png;base64", ["0 bytes"]),
        (b64(encoded()) + "*" + "A" * 5000, ["is text (", "not a path"]),
        (
            b64(b"no image at all" * 400),
            ["base64 that is no image (8000 characters), not a path"],
        ),
        ("a cat. " * 1000, ["is text (7000 characters), not a path"]),
        ("x" * 256, ["256 characters", "not a path"]),
        ("a/" * 2500, ["not a path"]),
        ("\ud800.png", ["surrogate"]),
        ({"bytes": b64(encoded())[:41]}, ["not base64"]),
    ],
)
def test_what_is_told_of_texts(image, words):
    refused("images[0]", *words, images=[image])


# --- parts of messages ----------------------------------------------------------------------------


def asked(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def test_images_in_messages():
    data, text = encoded(), b64(encoded())
    pixels = Image.new("RGB", (7, 6))
    parts = [
        {"type": "image", "image": f"data:image/png;base64,{text}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}", "detail": "low"}},
        {"type": "image_url", "image_url": text},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "b.png"},
        {"type": "image", "base64": text},
        {"type": "image", "bytes": data, "path": None},
        {"type": "image", "image": {"bytes": data, "path": None}},
        {"type": "image", "image": pixels, "url": None},
    ]
    record = parse(prompt=asked(*parts))
    assert [image.data for image in record.images] == [data] * 3 + [None] * 2 + [data] * 3 + [None]
    assert [image.path and image.path.name for image in record.images[3:5]] == ["a.png", "b.png"]
    assert image_size(record.images[-1]) == (7, 6)
    assert record.images[1].where == "pairs.jsonl record 3, prompt[0].content[1].image_url.url"
    assert record.messages[0].places == 9
    assert not any(part.inline for part in record.messages[0].content)


def test_images_in_messages_and_beside_them():
    inline, place = {"type": "image", "image": "in.png"}, {"type": "image"}
    empty = {"type": "image", "image": {"bytes": None, "path": None}, "text": None}
    for bare in (place, empty):
        record = parse(prompt=asked(bare, inline, bare), images=["1.png", "2.png"])
        assert [image.path.name for image in record.images] == ["1.png", "in.png", "2.png"]
    refused("images", "2 places", "images are 1", prompt=asked(place, inline, place), images=["1.png"])
    refused("URL", prompt=asked({"type": "image_url", "image_url": {"url": "https://a.org/b.png"}}))
    refused("[0].image: found int", prompt=asked({"type": "image", "image": 7}))
    refused("leaves", prompt=asked({"type": "image", "image": "../b.png"}))


def test_whole_conversations_with_images():
    def talk(answer, image):
        return [*asked({"type": "image", "image": image}), {"role": "assistant", "content": answer}]

    for one, other in [("a.png", "b.png"), (np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8))]:
        fields = {"prompt": None, "chosen": talk("A cat.", one)}
        assert len(parse(**fields, rejected=talk("A dog.", one)).images) == 1
        refused("rejected", "differs from chosen", **fields, rejected=talk("A dog.", other))


# --- roots ----------------------------------------------------------------------------------------


def test_several_roots(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    roots = Roots([tmp_path / "a", tmp_path / "b"])
    found = [parse(images=[name], root=roots).images[0].path for name in ("1.png", "2.png")]
    assert found == [tmp_path.resolve() / "a/1.png", tmp_path.resolve() / "b/2.png"]
    refused(
        "no file '3.png'",
        f"{tmp_path}/a'",
        f"{tmp_path}/b'",
        "--data.image-root",
        images=["3.png"],
        root=roots,
    )
    (tmp_path / "c.png").touch()
    refused("leaves the image folder", "--data.allow-outside", images=["../c.png"], root=roots)
    free = Roots([tmp_path / "a", tmp_path / "b"], allow_outside=True)
    assert parse(images=["../c.png"], root=free).images[0].path == tmp_path.resolve() / "c.png"
