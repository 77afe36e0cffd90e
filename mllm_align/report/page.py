"""What all pages share: marked texts, pictures, curves, tables, and the template that they extend.

A page is one self-contained HTML file, without network access, and without scripts but the one that a
template allows by its digest. Its own template extends base.html.jinja, which has head, style and footer,
and imports parts.html.jinja.
"""

from __future__ import annotations

import base64
import io
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import IO, Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined

from mllm_align.files import new_file
from mllm_align.report import charts

Spans = Sequence[tuple[int, int]]
SHARED = "mllm_align.report"
NOTHING = "–"  # shown for a missing value
PICTURE = 192  # approximate length in pixels to which a small picture's longer side is enlarged
SHARP = 1 << 15  # bytes of a small picture that is kept as it is
THUMBNAIL = 480  # pixels of the longer side to which a large picture is reduced; shown at half that size


class Piece(NamedTuple):
    """A run of characters with the same marks."""

    text: str
    wrong: bool
    regenerated: bool


@dataclass(frozen=True)
class Marked:
    """A response with marked spans of characters [start, stop).

    wrong: words for absent things. regenerated: text that the policy generated for a rejected response.
    Spans may touch, overlap, be empty or exceed the text.
    """

    text: str
    wrong: Spans = ()
    regenerated: Spans = ()

    @property
    def pieces(self) -> list[Piece]:
        """The text, split where a span begins or ends."""
        inside = {
            min(max(0, end), len(self.text)) for span in (*self.wrong, *self.regenerated) for end in span
        }
        cuts = sorted(inside | {0, len(self.text)})
        return [
            Piece(self.text[a:b], _covered(a, b, self.wrong), _covered(a, b, self.regenerated))
            for a, b in pairwise(cuts)
        ]


WORD = re.compile(r"\w+(?:['’-]\w+)*")


def differing(one: str, other: str) -> tuple[Spans, Spans, float]:
    """Where two texts have different words, in each of them, and their likeness: twice the words that
    they have in common and in one order, as a share of all. Case and punctuation do not count."""
    found = [list(WORD.finditer(text)) for text in (one, other)]
    words = [[each[0].casefold() for each in own] for own in found]
    matcher = SequenceMatcher(None, *words, autojunk=False)
    spans: tuple[list[tuple[int, int]], ...] = [], []
    for kind, *ends in matcher.get_opcodes():
        for own, into, first, last in zip(found, spans, ends[::2], ends[1::2], strict=True):
            if kind != "equal" and first < last:
                into.append((own[first].start(), own[last - 1].end()))
    return spans[0], spans[1], matcher.ratio()


def _covered(first: int, last: int, spans: Spans) -> bool:
    return any(a <= first and last <= b for a, b in spans)


@dataclass(frozen=True)
class Curve:
    """Named series of (x, y); a point that is None or not finite leaves a gap in the line."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[charts.Point]]


def drawn(curves: Sequence[Curve]) -> list[tuple[Curve, str]]:
    """The curves with their charts; those without a finite point are left out."""
    labelled = [(curve, f"{curve.title}: {curve.y_label} over {curve.x_label}") for curve in curves]
    found = [
        (curve, charts.lines(curve.series.values(), curve.x_label, curve.y_label, label))
        for curve, label in labelled
    ]
    return [(curve, svg) for curve, svg in found if svg]


# ---- pictures ----------------------------------------------------------------------------------------


def picture(png: bytes) -> dict[str, Any]:
    """Source and size on the page of a PNG file; small pictures are enlarged by an integer factor."""
    width, height = struct.unpack(">II", png[16:24])
    factor = max(1, PICTURE // max(width, height, 1))
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return {"src": source, "width": width * factor, "height": height * factor, "enlarged": factor > 1}


def thumbnail(file: str | Path | IO[bytes], side: int = THUMBNAIL) -> dict[str, Any] | None:
    """The same of a picture's file in any format, its longer side reduced; None if it can't be read."""
    from PIL import Image

    packed = io.BytesIO()
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
        if max(small.size) <= PICTURE:
            small.save(packed, "PNG")
            if packed.tell() <= SHARP:
                return picture(packed.getvalue())
            packed = io.BytesIO()
        small.thumbnail((side, side))
        small.save(packed, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    source = "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
    scale = min(1.0, side / 2 / max(small.size))
    width, height = (max(1, round(scale * side)) for side in small.size)
    return {"src": source, "width": width, "height": height, "enlarged": False}


# ---- tables ------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """change: against the first model."""

    mean: str
    reach: str
    notes: list[str]
    change: str = ""


class Row(NamedTuple):
    """metric: has `name`, `meaning` and `way` (-1 if lower is better, 1 if higher is, 0 if neither)."""

    metric: Any
    cells: list[Cell]
    n: str


class Table(NamedTuple):
    """models: the columns; each has `key`, a class of the style sheet, `name` and `detail`."""

    models: Sequence[Any]
    rows: list[Row]


def groups(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """A table of the ungrouped settings, and one per group, as (name, rows)."""
    alone = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    inside = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    tables = {"general": alone, **inside}.items()
    return [(name, [(key, plain(each)) for key, each in flat(v)]) for name, v in tables if v]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, those of a mapping within as `group.name`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: Any) -> str:
    """A setting as text."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or NOTHING
    return str(value)


def number(value: Any, form: str, unit: str = "") -> str:
    """A number as text; NOTHING for what is none."""
    return format(value, form) + unit if isinstance(value, Real) and math.isfinite(value) else NOTHING


# ---- the file ----------------------------------------------------------------------------------------


def render(package: str, template: str, **values: Any) -> str:
    """A page; all texts are escaped. package: has the template."""
    page = _environment(package).get_template(template).render(**values)
    return page.encode(errors="replace").decode()  # a path may have bytes that are not UTF-8


def write(text: str, out: Path) -> None:
    """Write a page to `out` atomically; raises InputError if it can't be written."""
    with new_file(out) as file:
        file.write(text)


@cache
def _environment(package: str) -> Environment:
    def load(name: str) -> str | None:
        places = (files(each).joinpath(name) for each in (package, SHARED))
        return next((place.read_text(encoding="utf-8") for place in places if place.is_file()), None)

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(load),
    )
    environment.filters["picture"] = picture
    return environment
