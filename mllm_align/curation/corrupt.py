"""Rejected responses that an LLM writes from the chosen ones: a job whose answers are kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_align.config import DataConfig
from mllm_align.config.checks import SEED, check_number
from mllm_align.config.servers import Writer
from mllm_align.curation.corruption import KINDS, Asked, fault, kinds_of
from mllm_align.curation.items import REJECTED, Item, listed, read_items, without
from mllm_align.curation.writer import TRIES, Answers, check_writer, open_writer
from mllm_align.curation.writing import check_name, write
from mllm_align.curation.written import Fault, cleaned
from mllm_align.data.mixture import set_names
from mllm_align.errors import InputError


def corrupt(
    files: Sequence[Path], out: Path, writer: Writer, *, seed: int = 0, data: DataConfig | None = None
) -> dict[str, Any]:
    """Write `out`: of every record the chosen response, and a rejected one that the writer made of it.

    Answers are kept in a folder beside it (pairs.answers); the same call asks for those alone that are not
    there. An answer that can't be used is asked for again, at most TRIES times in all; records without a
    usable one are left out. Returns counts: records, pairs, left_out and tries (answers that could not be
    used), both by the reason, kinds of the pairs, sent (requests) and from_disk. Raises InputError for data
    that can't be read, where the writer can't be asked, and where nothing it wrote is usable.
    """
    check_name(out)
    check_number("--seed", seed, 0, SEED)
    check_writer(writer)
    config, names = data or DataConfig(), set_names(files)
    items = [item for name, file in names.items() for item in read_items(file, name, config)]
    kinds = kinds_of([f"{item.source} {item.record.id}" for item in items], seed)
    with open_writer(writer, out) as asks:
        found = _Found(items, kinds)
        for attempt in range(TRIES):
            found.take(asks([*found.left.values()]), asks.silence, last=attempt + 1 == TRIES)
        if not found.written:
            raise InputError(
                f"nothing that {writer.shown} wrote for {len(items)} records can be used "
                f"({listed(found.left_out)}); take another writer"
            )
        write(found.pairs(writer), out)
    return found.summary() | {"sent": asks.sent, "from_disk": asks.from_disk}


def told(out: Path, found: dict[str, Any]) -> str:
    """What came of the work, in a few lines."""
    left_out = listed(found["left_out"])
    lines = [f"{out.name}: {found['pairs']:,} pairs of {found['records']:,} records"]
    lines[0] += f" (left out: {left_out})" if left_out else ""
    lines.append(f"changes asked for: {listed(found['kinds'])}")
    if found["tries"]:
        lines.append(f"answers that could not be used: {listed(found['tries'])}")
    lines.append(f"{found['sent']:,} requests sent, {found['from_disk']:,} answers were on disk")
    return "\n".join(lines)


class _Found:
    """What is wanted, and what has come of it. left: requests to be sent, by the records' places."""

    def __init__(self, items: Sequence[Item], kinds: Sequence[str]):
        self.items, self.kinds = items, kinds
        self.left = {
            i: Asked(item.record, kind) for i, (item, kind) in enumerate(zip(items, kinds, strict=True))
        }
        self.written: dict[int, str] = {}
        self.attempts: dict[int, int] = {}  # of each record that is written
        self.tries: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def take(self, answers: Answers, silence: str, last: bool) -> None:
        """The answers to all that is left. silence: what no answer means; it is not asked for again. last:
        whether nothing is asked again."""
        again: dict[int, Asked] = {}
        for (place, asked), answer in zip(self.left.items(), answers, strict=True):
            if answer is None:
                self.left_out[silence] += 1
                continue
            chosen = asked.about.responses[0]
            text = cleaned(answer, chosen)
            bad: Fault | None = fault(chosen, text)
            if bad is None:
                self.written[place], self.attempts[place] = text, asked.number
                continue
            self.tries[bad.name] += 1
            if last:
                self.left_out[bad.name] += 1
            else:
                again[place] = replace(asked, number=asked.number + 1, before=(answer, bad))
        self.left = again

    def pairs(self, writer: Writer) -> list[Item]:
        """The records with their rejected responses, in order; a field says how these were made."""
        made = []
        for place, text in sorted(self.written.items()):
            item = self.items[place]
            record = replace(item.record, responses=(item.chosen, text))
            how = {
                "kind": self.kinds[place],
                "tries": self.attempts[place],
                "writer": writer.model or writer.name,
            }
            made.append(Item(record, item.source, without(item.fields, REJECTED) | {"corruption": how}))
        return made

    def summary(self) -> dict[str, Any]:
        kinds = Counter(self.kinds[place] for place in self.written)
        return {
            "records": len(self.items),
            "pairs": len(self.written),
            "left_out": dict(self.left_out.most_common()),
            "tries": dict(self.tries.most_common()),
            "kinds": {name: kinds[name] for name in KINDS},
        }
