"""Images written as text: data URIs and plain base64."""

import base64
import binascii
import re

from mllm_align.errors import InputError, one_line, quoted, refusal

# First bytes of image files. Pillow checks the rest of the header.
_SIGNATURES = (
    rb"\x89PNG\r\n\x1a\n",
    rb"\xff\xd8\xff",  # JPEG
    rb"GIF8[79]a",
    rb"RIFF....WEBP",
    rb"BM....\0\0\0\0",  # BMP
    rb"II\*\0|MM\0\*",  # TIFF
    rb"....ftyp(avif|avis)",
    rb"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
)
_SIGNATURE = re.compile(b"|".join(_SIGNATURES), re.DOTALL)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_URI = re.compile(r"\s*data:[\w.+/-]*[;,]", re.IGNORECASE)
_MIN_LENGTH = 40  # characters: no image is smaller, and few file names are longer
_STANDARD = str.maketrans("-_", "+/")  # URL-safe alphabet -> standard alphabet


def is_data_uri(text: str) -> bool:
    """Tell whether `text` is a data URI (`data:image/png;base64,...`)."""
    return _URI.match(text) is not None


def is_image_text(text: str) -> bool:
    """Tell whether `text` is base64 of an image, by its length, its alphabet and the file signature."""
    if len(text) < _MIN_LENGTH:
        return False
    head = "".join(text[:200].split())[:32]
    try:
        first = base64.b64decode(head.translate(_STANDARD), validate=True)
    except ValueError:
        return False
    return _SIGNATURE.match(first) is not None and _BASE64.fullmatch(text) is not None


def is_base64(text: str) -> bool:
    """Tell whether `text` consists of base64's alphabet only."""
    return _BASE64.fullmatch(text) is not None


def image_bytes(text: str, at: str) -> bytes:
    """Return the image file encoded in a data URI or base64 text.

    Accepts both alphabets and white space; padding may be missing. Raises `InputError`, which names `at`,
    for invalid or incomplete base64 and for bytes that are no image.
    """
    if is_data_uri(text):
        kind, _, text = text.partition(",")
        if not kind.lower().endswith(";base64"):
            raise refusal(at, f"the data URI {quoted(kind)} is not in base64", "write it as ...;base64,...")
    data = _decoded(text, at)
    if not data:
        raise refusal(at, "the image has 0 bytes", "replace it or drop the record")
    if _SIGNATURE.match(data) is None:
        problem = f"the base64 text of {len(text)} characters ({quoted(text)}) holds no image"
        raise refusal(at, problem, "give the base64 of a PNG or JPEG file, or a path")
    return data


def _decoded(text: str, at: str) -> bytes:
    plain = "".join(text.split()).translate(_STANDARD).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        problem = f"the text {quoted(text)} is not base64 ({one_line(error)})"
        raise refusal(at, problem, "encode the image file again, or give its path") from error


def no_path(text: str, at: str) -> InputError:
    """Return the error for a text that is too long for the path of a file."""
    what = "base64 that is no image" if is_base64(text) else "text"
    problem = f"{quoted(text)} is {what} ({len(text)} characters), not a path"
    return refusal(at, problem, "give a path, or an image file as data URI or base64")
