"""Images: their sources, sizes and RGB pixels.

Every unusable image raises `InputError`, which names the record and the file.
"""

import io
import re
import threading
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mllm_align.errors import InputError, one_line, quoted, refusal

MAX_PIXELS = 178_956_970  # Pillow's own limit: half a GiB as RGB
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # chunks with an orientation
_JPEG_END = b"\xff\xd9"
_header_lock = threading.Lock()


def is_url(path: str | Path) -> bool:
    """Tell whether `path` is a URL such as https://...; `Path` merges its two slashes into one."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def url_refusal(at: str, path: str | Path) -> InputError:
    """Return the error for an image given as a URL; this package never downloads one."""
    return refusal(at, f"{quoted(path)} is a URL", "download it first and give the file's path")


class StoredBytes:
    """Bytes inside a file, read on demand. Two are equal if they are the same bytes of the same file."""

    def read(self) -> bytes:
        """Return the bytes. Thread-safe. Raises whatever reading the file raises."""
        raise NotImplementedError


class OpenedFile:
    """A file that rows are read from. Two are equal if they are the same file, unchanged since it was
    opened."""

    def __init__(self, path: Path):
        self.path = path
        found = path.stat()
        self._state = str(path), found.st_ino, found.st_size, found.st_mtime_ns

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpenedFile) and self._state == other._state

    def __hash__(self) -> int:
        return hash(self._state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._state}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # unpickling opens the file again


@dataclass(frozen=True)
class ImageSource:
    """The source of one image: exactly one of `path`, `data` (an encoded file), `stored` and `image`.

    `where` names the image in error messages, such as `pairs.jsonl record 3, images[0]`.
    Raises `InputError` unless exactly one of the four is given.
    """

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    image: Image.Image | None = None
    where: str = "image"
    stored: StoredBytes | None = None

    def __post_init__(self) -> None:
        if (self.path, self.data, self.image, self.stored).count(None) != 3:
            raise refusal(self.where, "needs one of path, data, stored and image", "give exactly one")

    @property
    def key(self) -> Hashable:
        """Cache key: equal for equal sources of one run; None for a decoded image."""
        return self.path or self.data or self.stored

    def read(self) -> bytes | None:
        """Return the encoded file; None for a decoded image. Raises `InputError` if it is missing, empty or
        unreadable."""
        if self.image is not None:
            return None
        with _explained(self, MAX_PIXELS), _stream(self) as file:
            return file.read()

    @classmethod
    def from_memory(cls, image: Image.Image | np.ndarray, where: str = "image") -> "ImageSource":
        """Return the source of a decoded image.

        `image`: a PIL image, or a uint8 array [H, W], [H, W, 3] or [H, W, 4], which is copied.
        Raises `InputError` for any other array.
        """
        if isinstance(image, Image.Image):
            return cls(image=image, where=where)
        if not isinstance(image, np.ndarray):
            raise refusal(where, f"is a {type(image).__name__}", "give a PIL image or an array")
        channels = image.shape[2:]
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
            found = f"is an array of {image.dtype} {list(image.shape)}"
            raise refusal(where, found, "give uint8 [H, W], [H, W, 3] or [H, W, 4]")
        if 0 in image.shape:
            raise refusal(where, f"is an array without pixels {list(image.shape)}", "replace it")
        return cls(image=Image.fromarray(image.copy()), where=where)

    @property
    def label(self) -> str:
        """`where`, with the file's path if there is one."""
        return self.where if self.path is None else f"{self.where} ({one_line(self.path, 160)})"


def image_size(source: ImageSource, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) with the EXIF orientation applied.

    PNG and JPEG files are not decoded: the header gives the size, and the end shows that the file is
    complete. Raises `InputError` for a file that is missing, empty, no image, truncated, or of more than
    `max_pixels` pixels.
    """
    with _opened(source, max_pixels) as (image, file):
        if file is None:
            image.load()
            return _upright_size(image)
        if image.format == "JPEG" and _jpeg_is_whole(file):
            return _upright_size(image)
        if image.format != "PNG":
            return ImageOps.exif_transpose(image).size
        file.seek(0)
        contents = file.read()
        image.verify()
        if not any(name in contents for name in _PNG_ORIENTATION):
            return image.size
    # The orientation may be stored after the pixels, and Pillow cannot read on after verify().
    with _opened(source, max_pixels) as (image, _):
        return ImageOps.exif_transpose(image).size


def load_rgb(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image (its first frame) in mode RGB with the EXIF orientation applied.

    Transparency is blended onto white, as in Hugging Face's processors. 16-bit grey keeps its upper 8
    bits. Raises `InputError` where `image_size` does, and for pixels that cannot be decoded.
    """
    with _opened(source, max_pixels) as (image, _):
        upright = ImageOps.exif_transpose(image)  # always a copy
        if upright.mode == "I" or upright.mode.startswith("I;16"):
            upright = _upper_byte(upright, source)
        if "A" in upright.getbands() or upright.info.get("transparency") is not None:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")


@contextmanager
def _opened(source: ImageSource, max_pixels: int) -> Iterator[tuple[Image.Image, IO[bytes] | None]]:
    """Yield the checked image, undecoded, with its file; errors in the body become `InputError`, too."""
    if source.image is not None:
        _check_header(source.image, source, max_pixels)
        with _explained(source, max_pixels):
            yield source.image, None
        return
    with (
        _stream(source) as file,
        _explained(source, max_pixels),
        _header(file, max_pixels) as image,
    ):
        _check_header(image, source, max_pixels)
        yield image, file


def _stream(source: ImageSource) -> IO[bytes]:
    if source.path is None:
        data = _stored(source) if source.stored is not None else source.data
        if not data:
            raise refusal(source.label, "the image has 0 bytes", "replace it or drop the record")
        return io.BytesIO(data)
    if is_url(source.path):
        raise url_refusal(source.where, source.path)
    try:
        if not source.path.exists():
            raise refusal(source.label, "no such file", "check the path and the image folder")
        if not source.path.is_file():
            raise refusal(source.label, "is not a file", "give the path of an image file")
        if source.path.stat().st_size == 0:
            raise refusal(source.label, "the file is empty (0 bytes)", "replace it")
        return source.path.open("rb")
    except OSError as error:
        problem = f"cannot be opened ({one_line(error.strerror)})"
        raise refusal(source.label, problem, "check the path and its permissions") from error


def _stored(source: ImageSource) -> bytes:
    assert source.stored is not None
    try:
        return source.stored.read()
    except InputError:
        raise
    except Exception as error:  # damaged tables make pyarrow raise errors of several types
        problem = f"its bytes cannot be read ({type(error).__name__}: {one_line(error)})"
        raise refusal(source.label, problem, "check that the data file is complete") from error


@contextmanager
def _header(file: IO[bytes], max_pixels: int) -> Iterator[Image.Image]:
    # Pillow's limit is a global variable: it warns above the limit and raises above twice the limit. Both
    # are changed only while the header is read; the lock keeps our own threads apart.
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, (max_pixels + 1) // 2
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    with image:
        yield image


def _check_header(image: Image.Image, source: ImageSource, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(source, width * height, max_pixels)
    if width * height == 0:
        raise refusal(source.label, "the image has no pixels", "replace it or drop the record")
    if image.format == "EPS":  # Pillow would run Ghostscript on it
        raise refusal(source.label, "EPS images are not read", "save it as PNG or JPEG")
    if image.mode == "F":
        problem = "the image has floating point pixels of unknown range"
        raise refusal(source.label, problem, "save it with 8 bits per channel")


@contextmanager
def _explained(source: ImageSource, max_pixels: int) -> Iterator[None]:
    """Turn any exception of Pillow into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # the text begins with the number of pixels
        found = re.search(r"\d+", str(error))
        raise _too_large(source, found[0] if found else "?", max_pixels) from error
    except UnidentifiedImageError as error:
        problem = "is not an image, or its header is damaged"
        raise refusal(source.label, problem, "replace the file") from error
    except Exception as error:  # damaged files make Pillow raise errors of nearly every type
        problem = f"the image is damaged or cut short ({type(error).__name__}: {one_line(error)})"
        raise refusal(source.label, problem, "replace the file") from error


def _too_large(source: ImageSource, pixels: object, max_pixels: int) -> InputError:
    problem = f"the image has {pixels} pixels, more than the limit of {max_pixels}"
    return refusal(source.label, problem, "scale it down")


def _jpeg_is_whole(file: IO[bytes]) -> bool:
    """Look for the end-of-image marker; cameras may pad the file after it."""
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - 4096))
    return file.read().rstrip(b"\0\r\n").endswith(_JPEG_END)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if sideways else image.size


def _upper_byte(image: Image.Image, source: ImageSource) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion clips instead."""
    values: np.ndarray[Any, Any] = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        problem = "the grey values do not fit in 16 bits"
        raise refusal(source.label, problem, "save it with 8 or 16 bits per channel")
    return Image.fromarray((values >> 8).astype(np.uint8))
