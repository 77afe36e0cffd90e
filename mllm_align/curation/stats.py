"""What data sets hold: sizes, lengths, images, what repeats, what several of them share."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm_align.config import DataConfig
from mllm_align.curation.items import Item, read_items
from mllm_align.data.encode import Encoder, Identical
from mllm_align.data.images import ImageSource, image_size
from mllm_align.data.mixture import set_names
from mllm_align.data.preferences import conversation
from mllm_align.data.readers import told
from mllm_align.errors import SHOWN, InputError

POINTS = {"min": 0, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
MEASURES = {
    "prompt_words": "words of the prompt",
    "chosen_words": "words of the chosen",
    "rejected_words": "words of the rejected",
    "difference_words": "chosen minus rejected, words",
    "prompt_tokens": "tokens of the prompt",
    "chosen_tokens": "tokens of the chosen",
    "rejected_tokens": "tokens of the rejected",
    "total_tokens": "prompt and longest response",
    "image_width": "image width",
    "image_height": "image height",
}
VALUES = 20  # most different values of a field that are counted
LONG = 60  # characters of such a value
SHARED = {"images": "images", "prompts": "prompts with their images", "responses": "pairs of responses"}


class Tokens(NamedTuple):
    """How a model counts. limit: most tokens of a prompt with its longest response."""

    encoder: Encoder
    limit: int


def statistics(files: Sequence[Path], config: DataConfig, tokens: Tokens | None = None) -> dict[str, Any]:
    """The figures of data sets, as JSON has them: `sets` by name, `overlap` of each two.

    Records are read one by one, and of an image no more is kept than a digest. Raises InputError for data
    that can't be read; images that can't are counted.
    """
    names = set_names(files)
    sets = {name: _Set(tokens) for name in names}
    for name, file in names.items():
        for item in read_items(file, name, config, sets[name].dropped):
            sets[name].add(item)
    overlap = [
        {"sets": [one, other]} | {what: sets[one].shared(sets[other], what) for what in SHARED}
        for one, other in combinations(sets, 2)
    ]
    return {"sets": {name: each.figures() for name, each in sets.items()}, "overlap": overlap}


@dataclass
class _Set:
    """The figures of a set, while it is read. seen: digests of what may repeat, and how often it came."""

    tokens: Tokens | None
    dropped: Counter[str] = field(default_factory=Counter)
    records: int = 0
    single: int = 0
    identical: int = 0
    longer: int = 0
    shorter: int = 0
    over: int = 0
    untold: int = 0  # records whose tokens can't be counted
    without_image: int = 0
    broken: list[str] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    values: dict[str, array] = field(default_factory=lambda: {name: array("q") for name in MEASURES})
    fields: dict[str, Counter[str] | None] = field(default_factory=dict)  # None: too many values
    seen: dict[str, Counter[bytes]] = field(default_factory=lambda: {what: Counter() for what in SHARED})
    _known: dict[Path, tuple[bytes, tuple[int, int] | None]] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        record, chosen, rejected = item.record, item.chosen, item.rejected
        self.records += 1
        self.sources[item.source] += 1
        for name, value in item.fields.items():
            self._field(name, value)
        self._put("prompt_words", words(item.prompt))
        self._put("chosen_words", words(chosen))
        if rejected is None:
            self.single += 1
        else:
            difference = words(chosen) - words(rejected)
            self._put("rejected_words", words(rejected))
            self._put("difference_words", difference)
            self.longer += difference > 0
            self.shorter += difference < 0
            self.identical += chosen.strip() == rejected.strip()
        images = [self._image(source) for source in record.images]
        self.without_image += not images
        texts = repr([(m.role, m.text.strip(), m.places) for m in conversation(record)])
        self.seen["prompts"][_digest(texts.encode(), *(key for key, _ in images))] += 1
        self.seen["responses"][_digest(repr(record.responses[:2]).encode())] += 1
        sizes = [size for _, size in images if size is not None]
        if self.tokens is None:
            return
        if len(sizes) < len(images):
            self.untold += 1
        else:
            self._count(item, tuple(sizes), self.tokens)

    def _field(self, name: str, value: Any) -> None:
        counts = self.fields.setdefault(name, Counter())
        if counts is not None and value is not None:
            counts[str(value)] += 1
            plain = isinstance(value, str | int | float) and len(str(value)) <= LONG
            if not plain or len(counts) > VALUES:
                self.fields[name] = None

    def _put(self, name: str, value: int) -> None:
        self.values[name].append(value)

    def _image(self, source: ImageSource) -> tuple[bytes, tuple[int, int] | None]:
        """Its digest, and (width, height) if it can be read."""
        if source.path is not None and source.path in self._known:
            key, size = self._known[source.path]
        else:
            size = None
            try:
                data = source.read()
                key = _digest(data or b"")
                size = image_size(ImageSource(data=data, where=source.label))
            except InputError as error:
                self.broken.append(str(error))
                key = _digest(source.label.encode())
            if source.path is not None:
                self._known[source.path] = key, size
        if size is not None and key not in self.seen["images"]:
            self._put("image_width", size[0])
            self._put("image_height", size[1])
        self.seen["images"][key] += 1
        return key, size

    def _count(self, item: Item, sizes: tuple[tuple[int, int], ...], tokens: Tokens) -> None:
        record, encoder = item.record, tokens.encoder
        try:
            ids = encoder.tokens(record, sizes, min(2, len(record.responses)))
            encoded = encoder.encoded(record, *ids, sizes, 0)
        except Identical:
            self.untold += 1
            return
        self._put("prompt_tokens", encoded.shape.prefix)
        for name, answer in zip(("chosen_tokens", "rejected_tokens"), encoded.responses, strict=False):
            self._put(name, len(answer))
        self._put("total_tokens", encoded.length)
        self.over += encoded.length > tokens.limit

    def shared(self, other: _Set, what: str) -> int:
        """How many different ones are in both sets."""
        return len(self.seen[what].keys() & other.seen[what].keys())

    def figures(self) -> dict[str, Any]:
        pairs = self.records - self.single
        repeated = {what: sum(counts.values()) - len(counts) for what, counts in self.seen.items()}
        figures: dict[str, Any] = {
            "records": self.records,
            "left_out": dict(+self.dropped),
            "sources": dict(self.sources),
            "fields": {name: counts and dict(counts.most_common()) for name, counts in self.fields.items()},
            "without_rejected": self.single,
            "identical": self.identical,
            "chosen_longer": self.longer / pairs if pairs else None,
            "rejected_longer": self.shorter / pairs if pairs else None,
            "repeated_prompts": repeated["prompts"],
            "repeated_responses": repeated["responses"],
            "different_images": len(self.seen["images"]),
            "without_image": self.without_image,
            "unreadable_images": len(self.broken),
            "first_unreadable": self.broken[:SHOWN],
        }
        figures |= {name: summary(values) for name, values in self.values.items() if values}
        if self.tokens is not None:
            counted = len(self.values["total_tokens"])
            figures["token_limit"] = self.tokens.limit
            figures["over_limit"] = self.over / counted if counted else None
            figures["tokens_not_counted"] = self.untold
        return figures


def words(text: str) -> int:
    """How many words a text has: runs of characters without white space."""
    return len(text.split())


def summary(values: Sequence[int]) -> dict[str, float]:
    """Mean and quantiles, linearly between neighbours."""
    found = np.percentile(values, list(POINTS.values()))
    return {"mean": float(np.mean(values))} | dict(zip(POINTS, map(float, found), strict=True))


def _digest(*parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.digest()


# ---- as text -----------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The figures for a terminal: a column for each set, quantiles as 5 % / 50 % / 95 %."""
    sets = found["sets"]
    rows = [("", *sets)]
    for label, cell in _rows():
        cells = [cell(each) for each in sets.values()]
        if any(cells):
            rows.append((label, *(each or "-" for each in cells)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(sets) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    for each in found["overlap"]:
        shared = ", ".join(f"{each[what]:,} {name}" for what, name in SHARED.items())
        lines.append(f"in both {' and '.join(each['sets'])}: {shared}")
    for name, each in sets.items():
        for what, counts in {"source": each["sources"], **each["fields"]}.items():
            told_values = f"more than {VALUES} values, or long ones"
            if counts:
                told_values = ", ".join(f"{value} {count:,}" for value, count in counts.items())
            if what != "source" or len(counts) > 1:
                lines.append(f"{name}, {what}: {told_values}")
        lines += [f"unreadable: {problem}" for problem in each["first_unreadable"]]
    return "\n".join(lines)


def _rows() -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    def number(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda each: f"{each[name]:,}" if each.get(name) else ""

    def share(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda each: "" if each.get(name) is None else f"{100 * each[name]:.1f} %"

    def spread(name: str) -> Callable[[dict[str, Any]], str]:
        def cell(each: dict[str, Any]) -> str:
            if name not in each:
                return ""
            s = each[name]
            return f"{s['mean']:z.1f} ({s['p5']:.0f} / {s['median']:.0f} / {s['p95']:.0f})"

        return cell

    spreads = {name: (label, spread(name)) for name, label in MEASURES.items()}
    return [
        ("records", number("records")),
        ("left out by the format's rules", lambda each: told(Counter(each["left_out"]))),
        ("without a rejected response", number("without_rejected")),
        ("identical responses", number("identical")),
        ("prompts that repeat, same image", number("repeated_prompts")),
        ("responses that repeat", number("repeated_responses")),
        *(spreads[name] for name in MEASURES if name.endswith("words")),
        ("chosen longer, in words", share("chosen_longer")),
        ("rejected longer, in words", share("rejected_longer")),
        *(spreads[name] for name in MEASURES if name.endswith("tokens")),
        ("limit of tokens", number("token_limit")),
        ("over the limit", share("over_limit")),
        ("tokens not counted", number("tokens_not_counted")),
        ("different images", number("different_images")),
        ("records without an image", number("without_image")),
        ("images that can't be read", number("unreadable_images")),
        *(spreads[name] for name in MEASURES if name.startswith("image")),
    ]
