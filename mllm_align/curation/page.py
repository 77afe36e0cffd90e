"""The page of a data set: pictures, pairs with the words that differ, how they were made, filters."""

from __future__ import annotations

import hashlib
import io
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mllm_align.config import DataConfig
from mllm_align.config.checks import STEPS, check_number
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.stats import words
from mllm_align.data.images import ImageSource
from mllm_align.data.mixture import set_names
from mllm_align.errors import InputError
from mllm_align.files import json_text, parse_json
from mllm_align.progress import progress_bar
from mllm_align.report import page
from mllm_align.report.page import Marked

SIDE = 256  # pixels of a thumbnail's longer side
LONG = 400  # characters of a field's value
ROLES = {"user": "asked", "assistant": "answered", "system": "system"}


def write_page(
    data: Sequence[Path], out: Path, *, limit: int = 2000, config: DataConfig | None = None
) -> str:
    """Draw records of data sets as one HTML file, which a browser opens from the disk.

    limit: records shown; of more, so many are drawn, the same ones at every call. Returns a sentence that
    tells how many there are. Raises InputError for data that can't be read, and where the page can't be
    written.
    """
    check_number("--limit", limit, 1, STEPS)
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file, such as page.html")
    config, names = config or DataConfig(), set_names(data)
    counts = [sum(1 for _ in read_items(file, name, config)) for name, file in names.items()]
    total, shown = sum(counts), min(limit, sum(counts))
    drawn = np.random.default_rng(0).choice(total, shown, replace=False)
    wanted, pictures = set(drawn.tolist()), _Pictures()
    every = (item for name, file in names.items() for item in read_items(file, name, config))
    records = []
    with progress_bar(shown, "drawing") as bar:
        for number, item in enumerate(every):
            if number in wanted:
                records.append(_record(item, pictures))
                bar.update()
    sentence = f"{total:,} records of {', '.join(names)}"
    sentence += f"; {shown:,} of them, drawn at random, are shown." if shown < total else "."
    script = _script()
    text = page.render(
        "mllm_align.curation",
        "page.html.jinja",
        report={"title": ", ".join(names), "verdict": []},
        methods=any(name == "BDHS" for record in records for name, _ in record["facts"]),
        sentence=sentence,
        sources=sorted({record["source"] for record in records}),
        content=_embedded({"records": records, "pictures": pictures.found}),
        script=Markup(script),
        digest=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    page.write(text, out)
    return sentence


def _embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: what could end it is escaped."""
    return Markup(json_text(value).replace("<", "\\u003c"))


@cache
def _script() -> str:
    return files("mllm_align.curation").joinpath("page.js").read_text(encoding="utf-8")


class _Pictures:
    """Thumbnails, each picture once."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._places: dict[bytes, int | None] = {}

    def __call__(self, source: ImageSource) -> int | None:
        """Its place among the thumbnails; None if it can't be read."""
        try:
            data = source.read() or b""
        except InputError:
            return None
        key = hashlib.blake2b(data, digest_size=12).digest()
        if key not in self._places:
            made = page.thumbnail(io.BytesIO(data), SIDE)
            self._places[key] = None if made is None else len(self.found)
            self.found += [] if made is None else [made]
        return self._places[key]


def _record(item: Item, pictures: _Pictures) -> dict[str, Any]:
    """What the page's script needs of a record."""
    fields = {name: _opened(value) for name, value in item.fields.items()}
    method, change = (
        each if isinstance(each, Mapping) else {}
        for each in (fields.pop("bdhs", None), fields.pop("corruption", None))
    )
    cuts, written = _cuts(method, item.rejected or "")
    one, other, likeness = page.differing(item.chosen, item.rejected or "")
    answers = [["chosen", _pieces(Marked(item.chosen, one, [(at, at) for at in cuts]), cuts)]]
    if item.rejected is not None:
        answers.append(["rejected", _pieces(Marked(item.rejected, other, written))])
    for number, text in enumerate(item.record.responses[2:], 3):
        answers.append([f"response {number}", [[text, 0]]])
    turns = item.record.messages[:-1]
    return {
        "id": item.record.id,
        "source": item.source,
        "history": [[ROLES[turn.role], turn.text.strip()] for turn in turns],
        "prompt": item.prompt,
        "answers": answers,
        "difference": None if item.rejected is None else words(item.chosen) - words(item.rejected),
        "likeness": None if item.rejected is None else round(likeness, 3),
        "pictures": [pictures(source) for source in (*item.record.images, *item.record.rejected_images)],
        "facts": [*_method(method), *_change(change), *_facts(fields)],
    }


def _opened(value: Any) -> Any:
    """A field that Parquet holds as JSON text, as it was."""
    if isinstance(value, str) and value[:1] == "{":
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _pieces(marked: Marked, cuts: Sequence[int] = ()) -> list[list[Any]]:
    """Texts with flags: 1 differs, 2 written by the model, 4 a cut, which has no text."""
    found, at = [], 0
    for piece in marked.pieces:
        found += [["", 4]] if at in cuts else []
        found.append([piece.text, piece.wrong + 2 * (piece.regenerated and not cuts)])
        at += len(piece.text)
    return found


# ---- how it was made ---------------------------------------------------------------------------------


def _cuts(method: Mapping[str, Any], rejected: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Where BDHS cut the chosen response, and the spans of the rejected one that the model wrote."""
    cuts, written, at = [], [], 0
    sentences = method.get("sentences")
    for each in sentences if isinstance(sentences, list) else []:
        if not isinstance(each, Mapping):
            continue
        cut, text = each.get("cut"), each.get("written")
        if isinstance(cut, int):
            cuts.append(cut)
        if isinstance(text, str) and text and (found := rejected.find(text, at)) >= 0:
            at = found + len(text)
            written.append((found, at))
    return cuts, written


def _method(method: Mapping[str, Any]) -> list[list[str]]:
    """What BDHS did, in words."""
    if not method:
        return []
    tries = method.get("similarities")
    told = [f"{method.get('iterations', 1)} tries" if method.get("iterations") != 1 else "1 try"]
    if isinstance(tries, list) and tries:
        told[0] += f", likeness {', '.join(page.number(each, '.2f') for each in tries)}"
    told.append("guided" if method.get("guided") else "free")
    if method.get("distortion") == "retrieved":
        told.append("under the last picture")
    elif (share := page.number(method.get("mask_share"), ".1%")) != page.NOTHING:
        told.append(f"{share} of the image hidden ({method.get('distortion', 'masked')})")
    return [["BDHS", "; ".join(told)]]


def _change(change: Mapping[str, Any]) -> list[list[str]]:
    """What a writer of the rejected response was asked for, in words."""
    if not change:
        return []
    tries = "1 try" if change.get("tries") == 1 else f"{change.get('tries')} tries"
    return [["asked to change", f"{change.get('kind')}; {tries}, by {change.get('writer')}"]]


def _facts(fields: Mapping[str, Any]) -> list[list[str]]:
    """The other fields of a row: reasons first, then what is short."""
    order = sorted(fields, key=lambda name: "reason" not in name)
    texts = [(name, _text(fields[name])) for name in order]
    return [
        [name.replace("_", " "), text if "reason" in name or len(text) <= LONG else text[:LONG] + "…"]
        for name, text in texts
        if text
    ]


def _text(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
