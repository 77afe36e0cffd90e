"""What pages share: pictures, curves, settings, and a template found beside the base's."""

import base64
import io
import math

import pytest
from PIL import Image

from mllm_align.errors import InputError
from mllm_align.report.page import Curve, differing, drawn, groups, number, picture, plain, thumbnail, write


def packed(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def inside(found):
    return Image.open(io.BytesIO(base64.b64decode(found["src"].partition(",")[2])))


def test_a_small_picture_is_enlarged_by_a_whole_number():
    found = picture(packed(Image.new("RGB", (50, 20)), "PNG"))
    assert (found["width"], found["height"], found["enlarged"]) == (150, 60, True)


def test_a_photograph_is_reduced(tmp_path):
    noise = Image.effect_noise((1600, 800), 80).convert("CMYK")
    (tmp_path / "a.jpg").write_bytes(packed(noise, "JPEG"))
    found = thumbnail(tmp_path / "a.jpg")
    assert found is not None and found["src"].startswith("data:image/jpeg;base64,")
    assert inside(found).size == (480, 240) and len(found["src"]) < 100_000
    assert (found["width"], found["height"], found["enlarged"]) == (240, 120, False)


def test_a_small_picture_of_a_file_stays_sharp(tmp_path):
    Image.new("P", (48, 64)).save(tmp_path / "a.gif")
    found = thumbnail(tmp_path / "a.gif")
    assert found is not None and inside(found).size == (48, 64)
    assert (found["width"], found["height"], found["enlarged"]) == (144, 192, True)


def test_a_small_photograph_is_packed_as_one(tmp_path):
    Image.effect_noise((190, 160), 80).convert("RGB").save(tmp_path / "a.png")
    found = thumbnail(tmp_path / "a.png")
    assert found is not None and found["src"].startswith("data:image/jpeg;base64,")
    assert (found["width"], found["height"], len(found["src"]) < 32_000) == (190, 160, True)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n", b"no picture"])
def test_what_is_no_picture_is_left_out(tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    assert thumbnail(tmp_path / "a.png") is None


@pytest.mark.parametrize(
    "one, other, wanted",
    [
        ("A red star.", "a red star", ([], [], 1.0)),
        ("Two red stars, far apart.", "A red star", (["Two", "stars, far apart"], ["A", "star"], 0.25)),
        ("a b c", "a x y c", (["b"], ["x y"], 4 / 7)),
        ("cat", "", (["cat"], [], 0.0)),
        ("", "", ([], [], 1.0)),
    ],
)
def test_words_that_differ(one, other, wanted):
    first, second, likeness = differing(one, other)
    assert ([one[a:b] for a, b in first], [other[a:b] for a, b in second], likeness) == wanted


def test_a_curve_without_points_is_left_out():
    there, empty = (Curve(name, "step", "y", {"a": [(1, y)]}) for name, y in (("A", 2.0), ("B", None)))
    assert [curve.title for curve, svg in drawn([there, empty])] == ["A"]


def test_settings_are_grouped():
    found = groups({"seed": 0, "lora": {"rank": 8, "deep": {"er": None}}, "none": {}})
    assert found == [("general", [("seed", "0")]), ("lora", [("rank", "8"), ("deep.er", "–")])]
    assert plain([1, (2.5, math.nan)]) == "1, 2.5, –" and plain([]) == "–"
    assert [number(x, ".1f", " s") for x in (1, math.nan, None, "a")] == ["1.0 s", "–", "–", "–"]


def test_a_page_that_cant_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        write("text", tmp_path / "file" / "page.html")
