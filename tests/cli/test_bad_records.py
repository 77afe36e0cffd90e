"""Records that are refused, on the command line."""

import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from runs import MODEL, PAIRS, events, rows, write_pairs


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 30000 x 30000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def damaged_jpeg() -> bytes:
    """Whole at both ends; the pixels between are not."""
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    data = stream.getvalue()
    return data[:1500] + b"\xff\xdb" * 50 + data[1600:]


@pytest.mark.parametrize(
    "contents, said",
    [
        (None, "no such file"),
        (b"", "0 bytes"),
        (b"GIF89a but no more", "damaged"),
        (b"once upon a time", "is not an image"),
        ((PAIRS.parent / "images" / "3_RGB.png").read_bytes()[:3000], "cut short"),
        (bomb(), "900000000 pixels"),
    ],
    ids=["missing", "empty", "broken", "no image", "truncated", "bomb"],
)
def test_bad_images(refused, tmp_path, contents, said):
    data = write_pairs(tmp_path, [*rows(2), {**rows()[0], "images": ["images/bad.png"]}])
    if contents is not None:
        (tmp_path / "images" / "bad.png").write_bytes(contents)
    line = refused("score", "--model", MODEL, "--data", data, "--out", tmp_path / "scores")
    assert "pairs.jsonl record 2, images[0]" in line and "bad.png" in line and said in line


@pytest.mark.parametrize(
    "change, at, said",
    [
        ({"prompt": "<image>\n<image>\nTwo?"}, "images", "2 image places but the record has 1 images"),
        ({"images": ["images/0_L.png"] * 2, "prompt": "<image> One?"}, "images", "1 image places"),
        ({"chosen": " "}, "chosen", "the response is empty"),
        ({"rejected": None}, "rejected", "is missing"),
        ({"rejected": "tuku", "chosen": "tuku "}, "rejected", "identical to that of chosen"),
        ({"chosen": 3}, "chosen", "found int"),
        ({"prompt": {"a": 1}}, "prompt", "found dict"),
        ({"images": "images/0_L.png"}, "images", "found str"),
        ({"images": [7]}, "images[0]", "found int"),
        ({"images": ["../secret.png"]}, "images[0]", "leaves the image folder"),
        ({"images": ["https://example.org/a.png"]}, "images[0]", "is a URL"),
    ],
    ids=str,
)
def test_bad_records(refused, tmp_path, change, at, said):
    data = write_pairs(tmp_path, [rows()[0], {**rows()[1], **change}])
    line = refused("score", "--model", MODEL, "--data", data, "--out", tmp_path / "scores")
    assert f"pairs.jsonl record 1, {at}" in line and said in line


def test_a_template_that_loops_for_ever(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_align.data.template.SECONDS", 0.1)
    file = tmp_path / "loops.jinja"
    again = "{% for i in range(9999) %}"
    file.write_text(again * 3 + "{% endfor %}" * 3)
    argv = ("--model", MODEL, "--data", PAIRS, "--data.chat-template", file)
    for verb in (("score", "--out", tmp_path / "s"), ("inspect",), ("generate", "--out", tmp_path / "g")):
        line = refused(verb[0], *argv, *verb[1:])
        assert "record 0: the chat template refuses it (it takes longer than 0.1 seconds)" in line


def test_lines_that_are_not_json(refused, tmp_path):
    data = write_pairs(tmp_path, rows(2))
    data.write_text(data.read_text() + "{'id': 3}\n")
    argv = ("score", "--model", MODEL, "--data", data, "--out", tmp_path / "scores")
    assert "pairs.jsonl line 3, column 2: is not JSON" in refused(*argv)
    data.write_text("[]\n")
    assert "pairs.jsonl line 1: found list" in refused(*argv)
    data.write_text("")
    assert "holds no records" in refused(*argv)
    data.unlink()
    assert "no such file" in refused(*argv)


def test_paths_outside_are_accepted_when_asked(run, tmp_path):
    outside = [{**row, "images": [str(PAIRS.parent / row["images"][0])]} for row in rows()]
    data = write_pairs(tmp_path, outside)
    argv = ("inspect", "--model", MODEL, "--data", data)
    assert run(*argv)[0] == 2
    assert run(*argv, "--data.allow-outside")[0] == 0
    assert run(*argv, "--data.image-root", PAIRS.parent)[0] == 0


@pytest.mark.slow
def test_pixels_that_turn_out_damaged_stop_in_one_line(refused, run, tmp_path, config_file):
    """Headers are checked first, pixels when batches are made: by other threads, in the midst of work."""
    data = write_pairs(tmp_path, [{**row, "images": ["images/late.jpg"]} for row in rows()])
    late = tmp_path / "images" / "late.jpg"
    Image.open(PAIRS.parent / "images" / "3_RGB.png").convert("RGB").save(late)
    whole, out = late.read_bytes(), tmp_path / "run"
    argv = ("train", config_file, "--model", MODEL, "--data", data, "--out", out, "--save-every", 2)
    status, told, said = run(*argv)
    assert status == 0 and "step 4/4  loss" in told and not said
    shutil.rmtree(out / "checkpoints" / "4")
    kept = {p: p.read_bytes() for p in (out / "checkpoints" / "2").rglob("*") if p.is_file()}

    late.write_bytes(damaged_jpeg())
    line = refused("score", "--model", MODEL, "--data", data, "--out", tmp_path / "s", "--data.shapes", 1)
    assert "images[0]" in line and "late.jpg" in line and "damaged or cut short" in line
    status, _, said = run(*argv)
    assert status == 2 and "late.jpg" in said and said.count("\n") == 1
    assert {p: p.read_bytes() for p in kept} == kept

    late.write_bytes(whole)
    assert run(*argv)[0] == 0
    assert [e["step"] for e in events(out, "start")] == [0, 2, 2]
