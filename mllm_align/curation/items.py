"""Records of data files with what else their rows say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_align.config import DataConfig
from mllm_align.data.images import StoredBytes
from mllm_align.data.readers import read_each
from mllm_align.data.records import Record
from mllm_align.errors import InputError


@dataclass(frozen=True, slots=True)
class Item:
    """A record. source: the set that it is of, by its field `source` or else the file's name. fields: what
    its row says beside the record, without images."""

    record: Record
    source: str
    fields: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return self.record.messages[-1].text.strip()

    @property
    def chosen(self) -> str:
        return self.record.responses[0]

    @property
    def rejected(self) -> str | None:
        """None for a record with one response."""
        return self.record.responses[1] if len(self.record.responses) > 1 else None


REJECTED = ("rejected_", "bdhs", "difference_score", "reward_score")  # about the rejected response
RESPONSES = (*REJECTED, "chosen_", "corruption", "rewrite", "diversity_score", "scores", "models")


def without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The fields whose names begin otherwise."""
    return {name: value for name, value in fields.items() if not name.startswith(names)}


def listed(counts: Mapping[str, int]) -> str:
    """Counts by name, in words, without those that are 0."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def read_items(
    file: Path, name: str, config: DataConfig, dropped: Counter[str] | None = None, responses: int = 1
) -> Iterator[Item]:
    """The records of a data set, one by one, each with at least so many responses. dropped: counts what
    its format's rules leave out. Raises InputError for a record that can't be read, and where there is
    none."""
    found = False
    for each in read_each(file, **config.reading(), responses=responses, dropped=dropped):
        found, fields = True, each.fields
        source = fields.get("source")
        kept = {key: value for key, value in fields.items() if key != "source" and not _is_bytes(value)}
        yield Item(each.record, source if isinstance(source, str) and source else name, kept)
    if not found:
        raise InputError(f"{file} holds no records; give at least one")


def _is_bytes(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, bytes | StoredBytes) or any(map(_is_bytes, inside))
