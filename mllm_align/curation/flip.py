"""Pairs whose preference flips: what is chosen under one stated preference is rejected under another.

MetaAlign (arXiv 2410.14184) trains on answers to one question under several preferences; a pair of two of
them teaches that the preference, not the answer alone, decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.config import DataConfig
from mllm_align.config.checks import SEED, check_number
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.writing import check_name, encoded, write
from mllm_align.data.mixture import set_names
from mllm_align.data.records import Record
from mllm_align.errors import InputError
from mllm_align.files import json_text


def flip(
    files: Sequence[Path], out: Path, *, seed: int = 0, data: DataConfig | None = None
) -> dict[str, Any]:
    """Write `out`: each record with the answer to another preference as its rejected response.

    Records belong together if they have the same images and the same prompt but for their preferences. The
    rejected response is that of one of the others of its group with another text, drawn from the seed; its
    preferences are kept in the field `rejected_preferences`. Records without preferences, and those whose
    group has no other answer, are left out and counted. Returns records, groups, without_preferences,
    without_other and pairs. Raises InputError for data that can't be read and where no pair is made.
    """
    check_name(out)
    check_number("--seed", seed, 0, SEED)
    config, names = data or DataConfig(), set_names(files)
    items = [item for name, file in names.items() for item in read_items(file, name, config)]
    groups: dict[str, list[Item]] = {}
    for item in items:
        if item.record.preferences:
            groups.setdefault(_key(item.record), []).append(item)
    pairs, alone = [], 0
    for number, group in enumerate(groups.values()):
        rng = np.random.default_rng((seed, number))
        for item in group:
            others = [other for other in group if _opposed(item.record, other.record)]
            if others:
                pairs.append(_pair(item, others[int(rng.integers(len(others)))]))
            else:
                alone += 1
    if not pairs:
        problem = "no two records have one prompt, different preferences and different answers"
        raise InputError(f"{', '.join(names)}: {problem}; give several preferences for a prompt")
    write(pairs, out)
    kept = sum(map(len, groups.values()))
    counts = {"records": len(items), "groups": len(groups), "without_preferences": len(items) - kept}
    return counts | {"without_other": alone, "pairs": len(pairs)}


def told(found: dict[str, Any]) -> str:
    """What came of it, in a line."""
    left = {"without preferences": "without_preferences", "without another answer": "without_other"}
    notes = "; ".join(f"{found[name]:,} {what}" for what, name in left.items() if found[name])
    text = f"{found['pairs']:,} pairs of {found['records']:,} records in {found['groups']:,} groups"
    return text + (f" (left out: {notes})" if notes else "")


def _key(record: Record) -> str:
    """Of the images and of the prompt without its preferences."""
    state = hashlib.sha256(json_text([message.chat() for message in record.messages]).encode())
    for image in record.images:
        state.update(str(image.path).encode() if image.path is not None else encoded(image))
    return state.hexdigest()


def _opposed(one: Record, other: Record) -> bool:
    return one.preferences != other.preferences and one.responses[0].strip() != other.responses[0].strip()


def _pair(item: Item, other: Item) -> Item:
    record = replace(item.record, responses=(item.chosen, other.chosen))
    theirs = {"rejected_preferences": dict(other.record.preferences)}
    return replace(item, record=record, fields=item.fields | theirs)
