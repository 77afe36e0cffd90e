"""The records of data sets that score best: by a reward, by how much pairs differ, by their diversity."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm_align.config import DataConfig
from mllm_align.config.checks import SEED, check_number
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.where import OWN, Where
from mllm_align.curation.writing import check_name, write
from mllm_align.data.formats.base import RECORD
from mllm_align.data.mixture import set_names
from mllm_align.errors import InputError, Interrupted, first_few, quoted, refusal
from mllm_align.files import json_text
from mllm_align.locks import alone
from mllm_align.progress import progress_bar
from mllm_align.report.page import differing

Measure = Literal["reward", "diversity", "difference", "domains"]
DOMAINS = 512  # at most


@dataclass(frozen=True)
class Measured:
    """How records are scored.

    by: reward, of a reward model's run `reward` or by `score`, an expression over a record's fields (see
    `Where`); diversity, of sentence embeddings of `similarity`; difference, of the words of both responses;
    domains, how unsure a probe is to which of `domains` pseudo-domains a record belongs, by the states of
    `model`. seed: of diversity, the record that is taken first; of domains, their centres. batch_size: of a
    model, records at once. score_name: the score's field, where it is another than BY_score.
    """

    by: Measure
    reward: str | None = None
    score: str | None = None
    similarity: str = "lexical"
    model: str | None = None
    domains: int = 8
    seed: int = 0
    batch_size: int = 8
    score_name: str | None = None

    def __post_init__(self):
        given = {"--reward": self.reward, "--score": self.score}
        named = [name for name, value in given.items() if value is not None]
        if self.by == "reward" and len(named) != 1:
            raise InputError("--by reward needs either --reward RUN or --score EXPRESSION")
        if self.by != "reward" and named:
            raise InputError(f"{named[0]} goes with --by reward; --by is {self.by}")
        if (self.model is not None) != (self.by == "domains"):
            raise InputError(f"--by domains and --model go together; --by is {self.by}")
        check_number("--seed", self.seed, 0, SEED)
        check_number("--domains", self.domains, 2, DOMAINS)
        name = self.name
        if not name.isidentifier() or name in RECORD | set(OWN):
            remedy = "give a word that no field of a record has, as quality_score"
            raise refusal("--score-name", f"{quoted(name)} can't hold a score", remedy)

    @property
    def name(self) -> str:
        """The field that a record has its score in."""
        return self.score_name or f"{self.by}_score"


def select(
    files: Sequence[Path],
    out: Path,
    measured: Measured,
    *,
    keep: str | None = None,
    lowest: bool = False,
    per: str | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """Write `out`: the records with the highest scores, or the `lowest`, in the order of the data.

    keep: how many, "500", or which share, "0.1"; None keeps all, each with its score. Of equal scores the
    first are kept. per: an expression as `Where` takes it; so many, or such a share, but at least one, are
    then kept of the records of each of its values. Records without a score are left out. By domains, states
    lie in a folder beside `out` (chosen.states): the same call computes those alone that are not there.
    Returns counts: records, without_score (ids) and kept; scores, the lowest and highest of what is
    kept; and by domains `domains`: the sizes, and the probe's accuracy. Raises InputError for data that
    can't be read, for settings that can't be followed, and where fewer records have a score than are to be
    kept; NotFinite for a model's scores or states that are not finite.
    """
    check_name(out)
    config, names = data or DataConfig(), set_names(files)
    if measured.by == "diversity" and (keep is None or lowest):
        raise InputError("--by diversity takes one record after the other: give --keep, and no --lowest")
    if per is not None and (keep is None or measured.by == "diversity"):
        raise InputError(
            "--per goes with --keep, and not with --by diversity, which takes one after the other"
        )
    items = [item for name, file in names.items() for item in read_items(file, name, config)]
    groups = None if per is None else _groups(items, per)
    count = None if keep is None else _count(keep, len(items))
    more: dict[str, Any] = {}
    without: list[str] = []
    with alone(out):
        if measured.by == "diversity":
            found = _diversity(items, measured, count or len(items))
        else:
            if measured.by == "domains":
                items, scores, more = _domains(items, measured, config, out)
            else:
                scores = _scores(items, measured, config)
            found = {i: score for i, score in enumerate(scores) if score is not None}
            without = [items[i].record.id for i, score in enumerate(scores) if score is None]
            if len(found) < (count if count and groups is None else 1):
                problem = f"{len(found)} of {len(items)} records have a score by {measured.by}"
                raise InputError(f"{problem}; not {first_few(without)}; keep fewer, or score otherwise")
            best = sorted(found, key=lambda i: found[i], reverse=not lowest)
            best = best[:count] if groups is None else _of_each(best, groups, str(keep))
            found = {i: found[i] for i in best}
        kept = sorted(found)
        write([_with_score(items[i], measured.name, found[i]) for i in kept], out)
    scores = [found[i] for i in kept]
    counts = {"records": len(items), "without_score": without, "kept": len(kept)}
    return counts | {"scores": [min(scores), max(scores)]} | more


def told(measured: Measured, found: dict[str, Any]) -> str:
    """What came of it, in a line."""
    low, high = found["scores"]
    text = f"{found['kept']:,} of {found['records']:,} records, {measured.name} {low:.4g} to {high:.4g}"
    without = found["without_score"]
    text += f" ({len(without):,} have none: {first_few(without)})" if without else ""
    if "domain_sizes" in found:
        sizes, accuracy = found["domain_sizes"], found["probe_accuracy"]
        text += f"\n{len(sizes)} domains of {min(sizes):,} to {max(sizes):,} records; "
        text += f"the probe tells {accuracy:.1%} of those that it has not seen"
    return text


def _with_score(item: Item, name: str, score: float) -> Item:
    return replace(item, fields=item.fields | {name: round(score, 6)})


def _count(keep: str, records: int) -> int:
    """How many of the records "500" or "0.1" is."""
    share = re.fullmatch(r"0?\.\d+|1\.0*", keep)
    whole = re.fullmatch(r"\d{1,12}", keep)
    count = round(float(keep) * records) if share else int(keep) if whole else 0
    if count < 1 or (share is None and whole is None):
        problem = f"{quoted(keep)} keeps nothing of {records} records" if share or whole else quoted(keep)
        raise refusal("--keep", problem, "give a number of records, as 500, or a share, as 0.1")
    if count > records:
        raise refusal("--keep", f"is {count}, and there are {records} records", "keep fewer")
    return count


def _groups(items: Sequence[Item], per: str) -> list[str]:
    """The expression's value for each record, as text."""
    expression = Where(per, "--per")
    values = [json_text(expression.value(item)) for item in items]
    expression.check()
    return values


def _of_each(best: Sequence[int], groups: Sequence[str], keep: str) -> list[int]:
    """Of the records of each group the first so many, or the first share, but at least one."""
    sizes, taken = Counter(groups[i] for i in best), Counter[str]()
    kept = []
    for i in best:
        group = groups[i]
        most = max(round(float(keep) * sizes[group]), 1) if "." in keep else int(keep)
        if taken[group] < most:
            kept.append(i)
        taken[group] += 1
    return kept


# ---- scores ------------------------------------------------------------------------------------------


def _scores(items: Sequence[Item], measured: Measured, config: DataConfig) -> list[float | None]:
    if measured.by == "difference":
        return [_difference(item) for item in items]
    if measured.score is not None:
        return _of_fields(items, measured.score)
    return _rewards(items, measured, config)


def _difference(item: Item) -> float | None:
    """1 less the share of the words that both responses have in common, in one order."""
    return None if item.rejected is None else 1.0 - differing(item.chosen, item.rejected)[2]


def _of_fields(items: Sequence[Item], text: str) -> list[float | None]:
    expression = Where(text, "--score")
    values = [expression.value(item) for item in items]
    expression.check()
    for item, value in zip(items, values, strict=True):
        good = isinstance(value, int | float) and math.isfinite(value)
        if value is not None and not good:
            problem = f"--score gives {quoted(value)}"
            raise refusal(item.record.where, problem, "give a number, or none for records without")
    return [None if value is None else float(value) for value in values]


def _rewards(items: Sequence[Item], measured: Measured, config: DataConfig) -> list[float | None]:
    """The chosen response's reward, less the rejected one's where there is one."""
    from mllm_align.annotate.factory import Context
    from mllm_align.annotate.reward import RewardModel
    from mllm_align.annotate.verdict import Question

    model = RewardModel(model=measured.reward, batch_size=measured.batch_size)
    asks = model.open(Context(data=config, progress="scoring"))
    verdicts = asks([Question(item.record, item.record.responses[:2]) for item in items])
    found: list[float | None] = []
    for verdict in verdicts:
        one, *other = verdict.scores or (None,)
        found.append(one if one is None or not other else one - other[0])
    return found


def _domains(
    items: Sequence[Item], measured: Measured, config: DataConfig, out: Path
) -> tuple[list[Item], list[float | None], dict[str, Any]]:
    """The records, each with its `domain`, their scores, and what is told of the domains."""
    from mllm_align.curation.domains import domains, model_states

    folder, model = out.with_suffix(".states"), str(measured.model)
    try:
        states = model_states(model, [item.record for item in items], folder, config, measured.batch_size)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the states so far are kept in {folder}") from error
    known = {i: each for i, each in enumerate(states) if each is not None}
    if not known:
        raise InputError("every record is longer than the model's limit; raise --data.max-length")
    found = domains(np.stack([*known.values()]), measured.domains, measured.seed)
    scores: list[float | None] = [None] * len(items)
    labelled = list(items)
    for i, label, entropy in zip(known, found.labels, found.entropy, strict=True):
        scores[i] = float(entropy)
        labelled[i] = replace(items[i], fields=items[i].fields | {"domain": int(label)})
    more = {"domain_sizes": found.sizes, "probe_accuracy": round(found.accuracy, 4)}
    return labelled, scores, more


def _diversity(items: Sequence[Item], measured: Measured, count: int) -> dict[int, float]:
    """The records that are taken, and how far each was from all that were taken before; the first has 1.

    Farthest-point traversal, the greedy 2-approximation of k-center (Gonzalez 1985, as core-sets are chosen
    in arXiv 1708.00489): the next record is the one whose nearest neighbour among those taken is farthest;
    of several, the first. It is exact: every distance is computed. Distance: 1 less the similarity of
    prompt and chosen response.
    """
    away = _distances(measured.similarity, [f"{item.prompt}\n{item.chosen}" for item in items])
    place, distance, found = int(np.random.default_rng(measured.seed).integers(len(items))), 1.0, {}
    nearest = np.full(len(items), np.inf)
    with progress_bar(count, "choosing") as bar:
        for _ in range(count):
            found[place] = distance
            nearest = np.minimum(nearest, away(place))
            nearest[place] = -np.inf  # never again, though rounding puts a text at a distance from itself
            place = int(nearest.argmax())
            distance = float(nearest[place])
            bar.update()
    return found


def _distances(name: str, texts: Sequence[str]) -> Callable[[int], np.ndarray]:
    """From one of the texts to all of them [n]; similarities of equal texts may be off by rounding."""
    from mllm_align.generation.similarity import Embedded, open_similarity

    similarity = open_similarity(name)
    if isinstance(similarity, Embedded):
        vectors = similarity.encoder.embed(texts)
        return lambda place: np.maximum(1.0 - vectors @ vectors[place], 0.0)
    return lambda place: 1.0 - similarity([texts[place]] * len(texts), texts)
