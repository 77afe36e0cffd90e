"""Chosen responses in a writer's own words, reviewed: a job whose answers are kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm_align.config import DataConfig
from mllm_align.config.servers import Writer
from mllm_align.curation.items import Item, listed, read_items
from mllm_align.curation.rewriting import Review, Rewriting, approved, fault, objection
from mllm_align.curation.writer import TRIES, Asks, check_writer, open_writer
from mllm_align.curation.writing import check_name, write
from mllm_align.curation.written import Fault, cleaned
from mllm_align.data.mixture import set_names
from mllm_align.errors import InputError

UNREAD = Fault("review unread", "the review of it can't be read")


def rewrite(
    files: Sequence[Path], out: Path, writer: Writer, *, data: DataConfig | None = None
) -> dict[str, Any]:
    """Write `out`: the records with their chosen responses in the writer's own words.

    The writer rewrites a response, then says of what passed the checks whether it says the same. What does
    not is asked for again with the reason, at most TRIES times in all; then the record keeps its response.
    Each record has a field `rewrite`: approved, tries, writer, and the response as it was (`original`) or
    the last fault (`fault`). Answers are kept beside `out` (pairs.answers): the same call asks for those
    alone that are not there. Returns counts: records, rewritten, kept by the reason, tries (answers that
    could not be used, by the reason), sent (requests) and from_disk. Raises InputError for data that can't
    be read, where the writer can't be asked, and where nothing it wrote is approved.
    """
    check_name(out)
    check_writer(writer)
    config, names = data or DataConfig(), set_names(files)
    items = [item for name, file in names.items() for item in read_items(file, name, config)]
    with open_writer(writer, out) as asks:
        found = _Found(items, writer.model or writer.name)
        for _ in range(TRIES):
            found.attempt(asks)
        if not found.written:
            raise InputError(
                f"nothing that {writer.shown} wrote for {len(items)} records is approved "
                f"({listed(found.kept())}); take another writer"
            )
        write(found.items(), out)
    return found.summary() | {"sent": asks.sent, "from_disk": asks.from_disk}


def told(out: Path, found: dict[str, Any]) -> str:
    """What came of the work, in a few lines."""
    lines = [f"{out.name}: {found['rewritten']:,} of {found['records']:,} responses rewritten"]
    lines[0] += f" (as they were: {listed(found['kept'])})" if found["kept"] else ""
    if found["tries"]:
        lines.append(f"answers that could not be used: {listed(found['tries'])}")
    lines.append(f"{found['sent']:,} requests sent, {found['from_disk']:,} answers were on disk")
    return "\n".join(lines)


class _Found:
    """What is wanted, and what has come of it. left: requests to be sent, by the records' places. faults:
    the last one of each record that is not written."""

    def __init__(self, items: Sequence[Item], writer: str):
        self.all, self.writer = items, writer
        self.left = {i: Rewriting(item.record) for i, item in enumerate(items)}
        self.written: dict[int, tuple[str, int]] = {}  # with the number of the attempt
        self.faults: dict[int, str] = {}
        self.tries: Counter[str] = Counter()

    def attempt(self, asks: Asks) -> None:
        """Have all that is left written and reviewed; what can't be used is left for the next one."""
        wanted, self.left = self.left, {}
        texts: dict[int, str] = {}
        for (i, asked), answer in zip(wanted.items(), asks([*wanted.values()]), strict=True):
            if answer is None:
                self.faults[i] = asks.silence
                continue
            chosen = asked.about.responses[0]
            text = cleaned(answer, chosen)
            if (bad := fault(chosen, text)) is None:
                texts[i] = text
            else:
                self._again(i, asked, answer, bad)
        reviews = [Review(self.all[i].record, text) for i, text in texts.items()]
        for (i, text), review in zip(texts.items(), asks(reviews), strict=True):
            verdict = None if review is None else approved(review)
            if verdict:
                self.written[i] = text, wanted[i].number
                self.faults.pop(i, None)
            else:
                bad = UNREAD if verdict is None else objection(str(review))
                self._again(i, wanted[i], text, bad)

    def _again(self, i: int, asked: Rewriting, answer: str, bad: Fault) -> None:
        self.tries[bad.name] += 1
        self.faults[i] = bad.name
        self.left[i] = replace(asked, number=asked.number + 1, before=(answer, bad))

    def kept(self) -> dict[str, int]:
        """How many responses stay as they were, by the reason."""
        return dict(Counter(self.faults[i] for i in sorted(self.faults)).most_common())

    def items(self) -> list[Item]:
        made = []
        for i, item in enumerate(self.all):
            how: dict[str, Any] = {"approved": i in self.written, "writer": self.writer}
            record = item.record
            if i in self.written:
                text, tries = self.written[i]
                record = replace(record, responses=(text, *record.responses[1:]))
                how |= {"tries": tries, "original": item.chosen}
            else:
                how["fault"] = self.faults[i]
            made.append(Item(record, item.source, item.fields | {"rewrite": how}))
        return made

    def summary(self) -> dict[str, Any]:
        return {
            "records": len(self.all),
            "rewritten": len(self.written),
            "kept": self.kept(),
            "tries": dict(self.tries.most_common()),
        }
