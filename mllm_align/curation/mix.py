"""Several data sets into one file, by weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_align.config import DataConfig
from mllm_align.config.checks import STEPS, check_number
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.where import Where, everywhere
from mllm_align.curation.writing import check_name, write
from mllm_align.data.mixture import Weighted, check_shares, most, set_names, shares
from mllm_align.data.readers import told
from mllm_align.errors import InputError


def mix(
    sets: Sequence[Weighted],
    out: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    where: str | None = None,
    data: DataConfig | None = None,
) -> list[dict[str, Any]]:
    """Write `out`, a data set drawn from others: of every set its share, none of them twice.

    limit: records of the result; None: as many as the shares allow. where: see `Where`. The same arguments
    and files give the same file. Returns for each set its name, records, left_out (by its format's rules),
    filtered, taken. Raises InputError for data that can't be read, where a set has too few records, and
    where no record is left.
    """
    check_name(out)
    config = data or DataConfig()
    check_number("--limit", 1 if limit is None else limit, 1, STEPS)
    check_number("--seed", seed, 0, 2**63 - 1)
    names = set_names([each.file for each in sets])
    weights, found, kept = [each.weight for each in sets], [], []
    keep = everywhere if where is None else Where(where)
    for name, file in names.items():
        dropped: Counter[str] = Counter()
        good = [keep(item) for item in read_items(file, name, config, dropped)]
        kept.append(np.flatnonzero(good))
        found.append({"set": name, "records": len(good), "left_out": dict(+dropped)})
        found[-1] |= {"filtered": good.count(False)}
    if isinstance(keep, Where):
        keep.check()
    there = [len(each) for each in kept]
    counts = shares(most(there, weights) if limit is None else limit, weights)
    check_shares(counts, there, list(names), "--limit")
    if not sum(counts):
        raise InputError(f"no record is left of {', '.join(names)}; let --where keep some")
    items: list[Item] = []
    for number, (name, file) in enumerate(names.items()):
        chosen = np.random.default_rng((seed, number)).permutation(kept[number])[: counts[number]]
        wanted = set(chosen.tolist())
        items += [item for i, item in enumerate(read_items(file, name, config)) if i in wanted]
        found[number]["taken"] = counts[number]
    order = np.random.default_rng((seed, len(sets))).permutation(len(items))
    write([items[i] for i in order], out)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """What came of each set, a line each."""
    lines = []
    for each in found:
        left_out = told(Counter(each["left_out"]))
        notes = [f"{each['filtered']:,} filtered out"] * bool(each["filtered"]) + [left_out] * bool(
            left_out
        )
        lines.append(f"{each['set']}: {each['taken']:,} of {each['records']:,} records" + _listed(notes))
    return "\n".join(lines)


def _listed(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""
