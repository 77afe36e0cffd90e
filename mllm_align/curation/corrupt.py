"""Rejected responses that an LLM writes from the chosen ones: a job whose answers are kept on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_align.annotate.judge import LocalModel
from mllm_align.annotate.kept import Kept
from mllm_align.config import DataConfig
from mllm_align.config.checks import SEED, check_number
from mllm_align.config.servers import Writer
from mllm_align.curation.corruption import KINDS, Asked, Fault, cleaned, fault, kinds_of
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.writing import check_name, write
from mllm_align.data.mixture import set_names
from mllm_align.errors import InputError, Interrupted
from mllm_align.locks import alone
from mllm_align.progress import progress_bar

if TYPE_CHECKING:
    from mllm_align.models.bundle import Bundle

TRIES = 3  # answers of a record that are asked for
REPLACED = ("rejected_", "bdhs", "difference_score", "reward_score")  # fields about the rejected response
Tell = Callable[[int, str], None]
Answers = list[str | None]


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
    if not writer.given:
        raise InputError(
            "nobody is there to write; name an endpoint with --writer.url, or a --writer.model"
        )
    config, names = data or DataConfig(), set_names(files)
    items = [item for name, file in names.items() for item in read_items(file, name, config)]
    kinds = kinds_of([f"{item.source} {item.record.id}" for item in items], seed)
    folder = out.with_suffix(".answers")
    with alone(out):
        try:
            asks = _Model(writer, folder) if writer.model is not None else _Server(writer, folder)
            found = _Found(items, kinds)
            for attempt in range(TRIES):
                found.take(asks([*found.left.values()]), asks.silence, last=attempt + 1 == TRIES)
        except KeyboardInterrupt as error:
            raise Interrupted(f"interrupted; the answers so far are kept in {folder}") from error
        if not found.written:
            raise InputError(
                f"nothing that {writer.shown} wrote for {len(items)} records can be used "
                f"({_listed(found.left_out)}); take another writer"
            )
        write(found.pairs(writer), out)
    return found.summary() | {"sent": asks.sent, "from_disk": asks.from_disk}


def told(out: Path, found: dict[str, Any]) -> str:
    """What came of the work, in a few lines."""
    left_out = _listed(found["left_out"])
    lines = [f"{out.name}: {found['pairs']:,} pairs of {found['records']:,} records"]
    lines[0] += f" (left out: {left_out})" if left_out else ""
    lines.append(f"changes asked for: {_listed(found['kinds'])}")
    if found["tries"]:
        lines.append(f"answers that could not be used: {_listed(found['tries'])}")
    lines.append(f"{found['sent']:,} requests sent, {found['from_disk']:,} answers were on disk")
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


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
            kept = {name: value for name, value in item.fields.items() if not name.startswith(REPLACED)}
            made.append(Item(record, item.source, kept | {"corruption": how}))
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


# ---- who is asked ------------------------------------------------------------------------------------


class _Server:
    """An endpoint."""

    silence = "without an answer"

    def __init__(self, writer: Writer, folder: Path):
        from mllm_align.annotate.endpoint import EndpointClient

        self._client = EndpointClient(writer, folder)

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        with progress_bar(len(asked), "writing") as bar:

            def tell(place: int, text: str) -> None:
                bar.update()

            return self._client(asked, tell)

    @property
    def sent(self) -> int:
        return self._client.sent

    @property
    def from_disk(self) -> int:
        return self._client.from_disk


class _Model:
    """A model on these devices. Answers go by its weights, the length that they may have, and the text."""

    silence = "too long for the writer"

    def __init__(self, writer: Writer, folder: Path):
        from mllm_align.models.sources import open_model
        from mllm_align.prepare import name_weights

        source = open_model(str(writer.model))
        name_weights(source)
        self._of = f"{source.fingerprint} {writer.max_tokens}"
        self._kept, self.sent, self.from_disk = Kept(folder, 0), 0, 0
        self._asks = LocalModel(
            lambda: _load(writer), writer.max_tokens, writer.batch_size, progress="writing"
        )

    def __call__(self, asked: Sequence[Asked]) -> Answers:
        keys = [sha256(f"{self._of} {each.text}".encode()).hexdigest() for each in asked]
        left = [place for place, key in enumerate(keys) if key not in self._kept.answers]
        self.sent, self.from_disk = self.sent + len(left), self.from_disk + len(keys) - len(left)

        def keep(place: int, text: str) -> None:
            self._kept.count()
            self._kept.add(keys[left[place]], text)

        self._asks([asked[place].record for place in left], keep)
        return [self._kept.answers.get(key) for key in keys]


def _load(writer: Writer) -> Bundle:
    from mllm_align.models.bundle import load

    return load(str(writer.model), "auto", None)
