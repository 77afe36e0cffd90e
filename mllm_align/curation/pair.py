"""Preference pairs of candidate responses: an annotator scores all, the best goes against the worst.

PDS-DPO (arXiv 2412.17417) makes pairs so, of several models' responses and a reward model's scores.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mllm_align.annotate.factory import Context, open_annotator
from mllm_align.annotate.verdict import OUTCOMES, Question, Verdict, rank
from mllm_align.config import JudgeConfig, to_json
from mllm_align.config.checks import check_number
from mllm_align.curation.items import RESPONSES, Item, listed, read_items, without
from mllm_align.curation.writing import check_name, write
from mllm_align.data.encode import image_digest
from mllm_align.data.readers import records_from
from mllm_align.errors import InputError, quoted, refusal
from mllm_align.files import names_apart, parse_json
from mllm_align.locks import alone
from mllm_align.models.bundle import Bundle
from mllm_align.part_file import PartFile
from mllm_align.progress import progress_bar

TOGETHER = 64  # records that are asked about before their scores are kept
MOST = 1e6  # of a margin


class Candidate(NamedTuple):
    """A response and who wrote it; None where nobody says."""

    text: str
    model: str | None


def pair(
    data: Path,
    out: Path,
    config: JudgeConfig,
    *,
    responses: Sequence[Path] = (),
    margin: float = 0.0,
    base: Bundle | None = None,
    model: str | None = None,
) -> dict[str, Any]:
    """Write `out`: of every record the best of its candidates against the worst.

    responses: files that `generate --out` wrote for the same data, one for each model; without any, a
    record's candidates are its own responses. config: `annotator` scores them, `data` is how they are read.
    margin: least difference of the two scores. base: the policy's, where the annotator is that. model:
    fingerprint of the model that the annotator is or has, if any; scores by another are not gone on with.

    A pair has `chosen_score`, `rejected_score`, the scores of all its responses (`scores`; those that are
    neither best nor worst follow them), and with `responses` the names of the files (`chosen_model`,
    `rejected_model`, `models`). Scores are kept as they come: the same call goes on. Returns counts:
    records, pairs, left_out by the reason; scores, the means of best, worst and all; chosen and rejected,
    how often each model's response was it. Raises InputError for data, responses or an annotator that can't
    be used, and where no pair is left; NotFinite where rewards or logits are not finite.
    """
    check_name(out)
    check_number("--margin", margin, 0, MOST)
    items = list(read_items(data, data.name, config.data, responses=0 if responses else 1))
    found = [_own(item) for item in items]
    if responses:
        ids = [record.id for record in records_from(data, **config.data.reading(), responses=0)]
        found = _generated(ids, responses)
    usable = {i: each for i, each in enumerate(found) if len(each) > 1}
    if not usable:
        raise InputError(f"no record of {data} has two different responses; give several with --responses")
    with alone(out):
        job = PartFile(out, "pair", _stamp(config, model, items, usable), usable, _is_verdict)
        job.open()
        with job, progress_bar(len(usable), "scoring") as bar:
            bar.update(len(job.finished))
            todo = [i for i in usable if i not in job.finished]
            records = [items[i].record for i in usable]
            context = Context(base, out.with_suffix(".answers"), config.data, None, records)
            asks = open_annotator(config.annotator.on_mesh(config.mesh), context) if todo else None
            for start in range(0, len(todo), TOGETHER):
                part = todo[start : start + TOGETHER]
                asked = [Question(items[i].record, tuple(c.text for c in usable[i])) for i in part]
                assert asks is not None
                for i, verdict in zip(part, rank(asks, asked), strict=True):
                    job.add(i, {"outcome": verdict.outcome, "scores": list(verdict.scores)})
                bar.update(len(part))
        made = _Made(items, usable, margin)
        for i in usable:
            made.take(i, Verdict(job.finished[i]["outcome"], tuple(job.finished[i]["scores"])))
        if not made.pairs:
            raise InputError(f"no pair is left of {data} ({listed(made.left_out)}); lower --margin")
        write(made.pairs, out)
        job.part.unlink()
    return made.summary()


def told(found: dict[str, Any]) -> str:
    """What came of the work, in a few lines."""
    left_out = listed(found["left_out"])
    lines = [f"{found['pairs']:,} pairs of {found['records']:,} records"]
    lines[0] += f" (left out: {left_out})" if left_out else ""
    lines.append(
        "mean score: " + ", ".join(f"{name} {value:.4g}" for name, value in found["scores"].items())
    )
    for which in ("chosen", "rejected"):
        if found[which]:
            lines.append(f"{which}: {listed(found[which])}")
    return "\n".join(lines)


# ---- candidates --------------------------------------------------------------------------------------


def _own(item: Item) -> list[Candidate]:
    return _different(Candidate(text, None) for text in item.record.responses)


def _generated(ids: Sequence[str], files: Sequence[Path]) -> list[list[Candidate]]:
    """Of each record the responses in all files, which tell by its id that they are of this data."""
    names = [Path(name).stem for name in names_apart(files)]
    found: list[list[Candidate]] = [[] for _ in ids]
    for file, name in zip(files, names, strict=True):
        lines = _lines(file)
        if len(lines) != len(ids):
            raise refusal(str(file), f"has {len(lines)} lines for {len(ids)} records", "generate it anew")
        for line, id, own in zip(lines, ids, found, strict=True):
            if line["id"] != id:
                problem = f"has {quoted(line['id'])} where the data have {quoted(id)}"
                raise refusal(str(file), problem, "give what `generate` wrote for this data")
            own += [Candidate(text, name) for text in line["responses"] or ()]
    return [_different(each) for each in found]


def _lines(file: Path) -> list[dict[str, Any]]:
    """What `generate --out` wrote."""
    try:
        texts = file.read_bytes().splitlines()
    except OSError as error:
        raise refusal(str(file), f"can't be read ({error.strerror or error})", "check the path") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text)
            answers = line["responses"]
            good = isinstance(line["id"], str) and all(isinstance(each, str) for each in answers or ())
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            problem = "has no id with a list of responses"
            raise refusal(f"{file} line {number}", problem, "give what `generate --data --out` wrote")
        lines.append(line)
    return lines


def _different(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that training takes, each text once."""
    first: dict[str, Candidate] = {}
    for each in candidates:
        text = each.text.strip()
        if text and "<image>" not in text:  # readers would take it for the place of an image
            first.setdefault(text, each._replace(text=text))
    return list(first.values())


def _stamp(
    config: JudgeConfig, model: str | None, items: Sequence[Item], usable: dict[int, list[Candidate]]
) -> dict[str, Any]:
    """What the scores follow from."""
    digest = sha256()
    for i, candidates in usable.items():
        record = items[i].record
        turns = [message.chat() for message in record.messages]
        digest.update(
            json.dumps([record.id, turns, record.preferences, [each.text for each in candidates]]).encode()
        )
        for source in record.images:
            digest.update(image_digest(source))
    return {"config": to_json(config.annotator), "model": model, "data": digest.hexdigest()[:16]}


# ---- what came of them -------------------------------------------------------------------------------


def _is_verdict(row: dict[str, Any]) -> bool:
    """Whether a kept row is a verdict; may raise TypeError, too."""
    scores = row["scores"]
    good = isinstance(scores, list) and all(type(each) in (int, float) for each in scores)
    return good and row["outcome"] in OUTCOMES and (row["outcome"] != "ranked" or len(scores) > 1)


class _Made:
    """Pairs, and what was counted on the way."""

    def __init__(self, items: Sequence[Item], usable: dict[int, list[Candidate]], margin: float):
        self.items, self.usable, self.margin = items, usable, margin
        self.pairs: list[Item] = []
        self.left_out: Counter[str] = Counter({"with one response": len(items) - len(usable)})
        self.written: dict[str, Counter[str]] = {"chosen": Counter(), "rejected": Counter()}
        self.scores: dict[str, list[float]] = {"best": [], "worst": [], "all": []}

    def take(self, i: int, verdict: Verdict) -> None:
        if verdict.pair is None:
            self.left_out[verdict.outcome] += 1
            return
        ranked = [(verdict.scores[place], self.usable[i][place]) for place in verdict.ranking]
        (best, one), (worst, other) = ranked[0], ranked[-1]
        self.scores["all"] += verdict.scores
        self.scores["best"].append(best)
        self.scores["worst"].append(worst)
        if best - worst < self.margin:
            self.left_out["below the margin"] += 1
            return
        ordered = [ranked[0], ranked[-1], *ranked[1:-1]]
        fields: dict[str, Any] = {"chosen_score": best, "rejected_score": worst}
        fields["scores"] = [score for score, _ in ordered]
        if one.model is not None:
            fields |= {"chosen_model": one.model, "rejected_model": other.model}
            fields["models"] = [each.model for _, each in ordered]
            self.written["chosen"][one.model] += 1
            self.written["rejected"][str(other.model)] += 1
        item, texts = self.items[i], tuple(each.text for _, each in ordered)
        record = replace(item.record, responses=texts)
        self.pairs.append(replace(item, record=record, fields=without(item.fields, RESPONSES) | fields))

    def summary(self) -> dict[str, Any]:
        return {
            "records": len(self.items),
            "pairs": len(self.pairs),
            "left_out": dict((+self.left_out).most_common()),
            "scores": {name: round(float(np.mean(each)), 6) for name, each in self.scores.items()},
            **{name: dict(count.most_common()) for name, count in self.written.items()},
        }
