"""Image sources: sizes from headers, pixels as RGB, and every refusal."""

import io
import struct
import warnings
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image
from refusals import assert_refusal

from mllm_align.data.images import ImageSource, image_size, load_rgb
from mllm_align.errors import InputError

WHERE = "pairs.jsonl record 3, images[0]"
NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
# What each orientation number says was done to the upright image [2, 3].
UPRIGHT = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8)
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: np.rot90(UPRIGHT, 2).T,
    8: np.rot90(UPRIGHT, -1),
}


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def source(data):
    return ImageSource(data=data, where=WHERE)


def pixels(data):
    image = load_rgb(source(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def assert_refused(image_source, *words, calls=(image_size, load_rgb), **options):
    for call in calls:
        assert_refusal(partial(call, image_source, **options), image_source.where, *words)


@pytest.mark.parametrize("number", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(number, format):
    options = {"lossless": True} if format == "WEBP" else {}
    image = Image.fromarray(np.ascontiguousarray(STORED[number])).convert("RGB")
    data = encoded(image, format, exif=oriented(number), **options)
    assert image_size(source(data)) == (3, 2)
    assert np.array_equal(pixels(data), np.repeat(UPRIGHT[..., None], 3, axis=2))


@pytest.mark.parametrize("number", [1, 3, 6, 8])
def test_size_of_a_jpeg_follows_its_orientation(number):
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=oriented(number))
    assert image_size(source(data)) == ((50, 40) if number < 5 else (40, 50))
    assert load_rgb(source(data)).size == image_size(source(data))


def test_png_orientation_after_the_pixels_counts():
    data = encoded(Image.fromarray(NOISE), exif=oriented(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    iend = data.index(b"IEND") - 4
    moved = data[:start] + data[end:iend] + data[start:end] + data[iend:]
    assert image_size(source(moved)) == (40, 50) == load_rgb(source(moved)).size


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_size_does_not_decode_whole_files(format, monkeypatch):
    data = encoded(Image.fromarray(NOISE), format)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert image_size(source(data)) == (50, 40)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_upper_byte(format):
    values = np.array([[0, 255, 256], [4095, 40000, 65535]], dtype=np.uint16)
    found = pixels(encoded(Image.fromarray(values), format))
    assert found[..., 0].tolist() == [[0, 0, 1], [15, 156, 255]]
    assert (found == found[..., :1]).all()


def test_big_endian_and_wide_grey_are_scaled_likewise():
    values = np.array([[0, 256], [40000, 65535]])
    for image in (Image.fromarray(values.astype(">u2")), Image.fromarray(values.astype(np.int32))):
        found = load_rgb(ImageSource.from_memory(image))
        assert np.asarray(found)[..., 0].tolist() == [[0, 1], [156, 255]]


@pytest.mark.parametrize("value", [-1, 65536])
def test_grey_beyond_16_bits_is_refused(value):
    image = Image.fromarray(np.array([[value]], dtype=np.int32))
    assert_refused(ImageSource(image=image, where=WHERE), "16 bits", calls=[load_rgb])


def test_floating_point_pixels_are_refused():
    data = encoded(Image.new("F", (4, 3)), "TIFF")
    assert_refused(source(data), "floating point", "8 bits")


def test_cmyk_becomes_rgb_as_pillow_does_it():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    data = encoded(ink, "JPEG", quality=95)  # Pillow writes Adobe's inverted form
    assert b"Adobe" in data
    found = pixels(data).astype(int)
    assert found[..., 0].min() > 240 and found[..., 1:].max() < 15
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels(data), np.asarray(image.convert("RGB")))


def test_what_is_transparent_is_painted_on_white():
    rgba = np.dstack([NOISE, np.zeros((40, 50), np.uint8)])
    assert (pixels(encoded(Image.fromarray(rgba))) == 255).all()
    rgba[..., 3] = 255
    assert np.array_equal(pixels(encoded(Image.fromarray(rgba))), NOISE)
    assert pixels(encoded(Image.new("LA", (1, 1), (55, 128)))).tolist() == [[[155] * 3]]


@pytest.mark.parametrize(
    ("transparency", "second"), [(None, [0, 255, 0]), (1, [255] * 3), (bytes([255, 0, 255]), [255] * 3)]
)
def test_transparent_palette_entries_are_white(transparency, second):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(encoded(image, **options))
    assert found.tolist() == [[[255, 0, 0], second, [0, 0, 255]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "1", "RGB"])
def test_pixels_are_those_of_transformers(mode):
    from transformers.image_transforms import convert_to_rgb

    image = Image.fromarray(np.dstack([NOISE, NOISE[..., :1]])).convert(mode)
    theirs = convert_to_rgb(image, return_numpy=True)
    assert np.array_equal(np.asarray(load_rgb(ImageSource.from_memory(image))), theirs)


def test_grey_and_black_and_white():
    assert pixels(encoded(Image.new("L", (1, 1), 99))).tolist() == [[[99] * 3]]
    assert pixels(encoded(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_first_frame_counts(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 4)])
def test_arrays(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    array[..., 3:] = 255 if array.ndim == 3 else array[..., 3:]  # opaque
    image_source = ImageSource.from_memory(array, WHERE)
    expected = array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)
    expected = expected[..., :3].copy()
    array[:] = 0  # the source has its own copy
    assert image_size(image_source) == (5, 4)
    assert np.array_equal(np.asarray(load_rgb(image_source)), expected)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5), np.float32),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((4, 5, 3, 1), np.uint8),
        np.zeros((0, 5), np.uint8),
        "a string",
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(InputError, match="images") as caught:
        ImageSource.from_memory(array, WHERE)
    assert "\n" not in str(caught.value)


def test_image_in_memory_is_left_as_it_is():
    image = Image.new("RGB", (3, 2))
    image.getexif()[0x0112] = 6
    image_source = ImageSource.from_memory(image, WHERE)
    assert image_size(image_source) == (2, 3) == load_rgb(image_source).size
    assert image.size == (3, 2) and image.getexif()[0x0112] == 6


def test_image_without_pixels_is_refused():
    assert_refused(ImageSource(image=Image.new("RGB", (0, 5)), where=WHERE), "no pixels")


def test_exactly_one_origin():
    with pytest.raises(InputError, match="exactly one"):
        ImageSource(where=WHERE)
    with pytest.raises(InputError, match="exactly one"):
        ImageSource(data=b"x", image=Image.new("L", (1, 1)), where=WHERE)


def test_path(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(NOISE)))
    image_source = ImageSource(path=path, where=WHERE)
    assert image_size(image_source) == (50, 40)
    assert np.array_equal(np.asarray(load_rgb(image_source)), NOISE)


def test_unusable_paths(tmp_path):
    empty, text = tmp_path / "empty.png", tmp_path / "two\nlines.png"
    empty.touch()
    text.write_text("not an image")
    assert_refused(ImageSource(path=tmp_path / "gone.png", where=WHERE), "gone.png", "no such file")
    assert_refused(ImageSource(path=tmp_path, where=WHERE), "not a file")
    assert_refused(ImageSource(path=empty, where=WHERE), "empty.png", "0 bytes")
    assert_refused(ImageSource(path=text, where=WHERE), "two lines.png", "not an image")
    assert_refused(ImageSource(path=tmp_path / ("x" * 300), where=WHERE), "xxx", "opened")


@pytest.mark.parametrize("url", ["http://a.org/b.png", "HTTPS://a.org/b.png"])
def test_urls_are_refused(url, tmp_path):
    assert_refused(ImageSource(path=type(tmp_path)(url), where=WHERE), "download it first")


def test_empty_bytes_are_refused():
    assert_refused(source(b""), "0 bytes")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.9])
def test_cut_files_are_refused(format, kept):
    data = encoded(Image.fromarray(NOISE), format)
    assert_refused(source(data[: int(len(data) * kept)]), "damaged")


def test_cut_jpeg_with_a_whole_thumbnail_is_refused():
    thumbnail = encoded(Image.new("RGB", (8, 8)), "JPEG")
    data = encoded(Image.fromarray(NOISE), "JPEG")
    segment = b"\xff\xe5" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = data[:2] + segment + data[2:]
    assert image_size(source(data)) == (50, 40)
    assert_refused(source(data[:-300]), "damaged")


def test_padding_after_a_jpeg_is_no_damage():
    data = encoded(Image.fromarray(NOISE), "JPEG")
    assert image_size(source(data + b"\0" * 100)) == (50, 40)
    assert image_size(source(data + b"a trailer of some camera")) == (50, 40)


def test_flipped_bit_in_a_png_is_refused():
    data = bytearray(encoded(Image.fromarray(NOISE)))
    data[len(data) // 2] ^= 1
    assert_refused(source(bytes(data)), "damaged", calls=[image_size])


def test_decompression_bomb_is_refused_from_its_header():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bomb = source(png_header(30000, 30000))
        assert_refused(bomb, "900000000 pixels", "178956970")
        assert_refused(source(png_header(14000, 14000)), "196000000 pixels")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pixel_limit_is_exact(format):
    data = encoded(Image.fromarray(NOISE[:39, :49]), format)
    before = Image.MAX_IMAGE_PIXELS
    assert image_size(source(data), max_pixels=39 * 49) == (49, 39)
    assert load_rgb(source(data), max_pixels=39 * 49).size == (49, 39)
    assert_refused(source(data), "1911 pixels", "1910", max_pixels=39 * 49 - 1)
    assert_refused(source(data), "1911 pixels", max_pixels=100)
    assert before == Image.MAX_IMAGE_PIXELS


def test_pixel_limit_may_be_above_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(Image.fromarray(NOISE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(source(data)) == (50, 40)
        assert load_rgb(source(data)).size == (50, 40)


def test_eps_is_refused():
    data = encoded(Image.new("RGB", (4, 4)), "EPS")
    assert_refused(source(data), "EPS", "PNG or JPEG")
