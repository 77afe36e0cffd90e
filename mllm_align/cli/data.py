"""`mllm-align data ...`: data sets looked at, mixed, chosen from and built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from mllm_align.cli.shared import begin, log_beside, note, open_encoder
from mllm_align.config import DataConfig
from mllm_align.files import json_text, new_file

READING = ("data.format", "data.split", "data.pairs", "data.max-records", "data.image-root")
READING += ("data.allow-outside",)


def first(option: str) -> Any:
    """What puts an option's name before its values, where they stand first."""

    def place(argv: list[str]) -> list[str]:
        return argv if not argv or argv[0].startswith("-") else [option, *argv]

    return staticmethod(place)


@dataclass(frozen=True)
class DataStats:
    """What data sets hold, side by side: mllm-align data stats FILE ...

    Records, lengths in words (and in tokens of --model), what repeats, image sizes, what the sets share.
    Spreads are mean (5 % / median / 95 %). Writes nothing without --out.
    """

    COMMON: ClassVar[tuple[str, ...]] = (*READING, "data.max-length", "data.chat-template")
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets, each as train takes it; the word --files may be left out."""
    model: Path | None = None
    """Count tokens as this model does: its tokenizer and image layout are read, no weights."""
    out: Path | None = None
    """File for the numbers, JSON."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from mllm_align.curation.stats import Tokens, statistics, table

        tokens = None
        if self.model is not None:
            model, encoder = open_encoder(self.model, self.data)
            tokens = Tokens(encoder, self.data.max_length or model.decoder.max_length)
        found = statistics(self.files, self.data, tokens)
        if self.out is not None:
            with new_file(self.out) as file:
                file.write(json_text(found, indent=2) + "\n")
        print(table(found))


@dataclass(frozen=True)
class DataMix:
    """Filters data sets and mixes them into one: mllm-align data mix A:0.5 B:0.5 --limit N --out FILE.

    Writes pairs (or SFT records) in TRL's format with `source` and the other fields of their rows, in an
    order drawn from the seed. OUT.parquet holds the images; OUT.jsonl names their files, and images that
    were no files are written to OUT-images. OUT.log.jsonl says what was asked and what came of it.
    """

    COMMON: ClassVar[tuple[str, ...]] = READING
    place = first("--sets")

    sets: tuple[str, ...]
    """FILE:WEIGHT, data sets as train takes them and their shares of the result. The word --sets may be
    left out; weights need not sum to 1; without one it is 1."""
    out: Path
    """File to write, .parquet or .jsonl."""
    limit: int | None = None
    """Records of the result; default: as many as the shares allow. A record is taken once."""
    seed: int = 0
    """Which records are drawn, and their order."""
    where: str | None = None
    """Keep the records of which this holds, such as 'origin == "coco" and chosen|wordcount < 100'. An
    expression of Jinja over a record's fields (docs/curation.md)."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from mllm_align.curation.mix import mix, table
        from mllm_align.data.mixture import weighted

        sets = weighted(self.sets, "--sets")
        options = {"limit": self.limit, "seed": self.seed, "where": self.where}
        found = mix(sets, self.out, **options, data=self.data)
        log_beside(self.out, event="mix", **options, sets=found)
        print(table(found))
        written(self.out)


def written(out: Path) -> None:
    """Tell of a file of records that was written."""
    from mllm_align.curation.writing import leads_outside

    print(out)
    if leads_outside(out):
        note("it names images outside its folder: read it with --data.allow-outside")


@dataclass(frozen=True)
class DataShow:
    """A page of a data set's records: mllm-align data show FILE ... --out page.html

    Pictures, prompts, responses with the words that differ marked, what else the rows say: who wrote a
    response, a judge's reason, what BDHS did. With filters and a search. The page is one HTML file that a
    browser opens from the disk and that asks for nothing.
    """

    COMMON: ClassVar[tuple[str, ...]] = READING
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets, each as train takes it; the word --files may be left out."""
    out: Path
    """Page to write, such as page.html."""
    limit: int = 2000
    """Records shown; of more, so many are drawn at random. About 15 kB each."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from mllm_align.curation.page import write_page

        print(write_page(self.files, self.out, limit=self.limit, config=self.data))
        print(self.out)


@dataclass(frozen=True)
class DataBuild:
    """Data sets as one of tensorflow-datasets, in ArrayRecord files: mllm-align data build FILE --out DIR

    Records keep their order; images are stored as their files are. `train --data DIR` reads it as it is,
    and so does tensorflow-datasets: tfds.builder_from_directory(DIR).as_data_source("train"). TensorFlow is
    not needed. The folder is there whole, or not at all.
    """

    COMMON: ClassVar[tuple[str, ...]] = READING
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets, each as train takes it; the word --files may be left out."""
    out: Path
    """Folder to write."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from mllm_align.data.array_records import tensorflow_datasets

        tensorflow_datasets()  # refuses a machine without it
        from mllm_align.curation.build import build

        print(f"{build(self.files, self.out, self.data):,} records")
        print(self.out)


@dataclass(frozen=True)
class DataSelect:
    """The records of data sets that score best: mllm-align data select FILE --by MEASURE --keep N --out OUT

    Every record that is kept has its score in a field: reward_score, the margin of chosen over rejected;
    difference_score, the share of the words that differ between them; diversity_score, how far its prompt
    and chosen response are from those that were taken before it; domains_score, how unsure a probe is which
    of a model's pseudo-domains it is of. Writes what `data mix` does, in the order
    of the data; OUT.log.jsonl says what was asked and what came of it.
    """

    COMMON: ClassVar[tuple[str, ...]] = READING
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets, each as train takes it; the word --files may be left out."""
    by: Literal["reward", "diversity", "difference", "domains"]
    """What is scored."""
    out: Path
    """File to write, .jsonl or .parquet."""
    keep: str | None = None
    """How many records to keep, as 500, or which share, as 0.1; default: all, with their scores."""
    lowest: bool = False
    """Keep the lowest scores, not the highest: the smallest difference, the smallest margin."""
    reward: Path | None = None
    """Of --by reward: the run folder of a reward model, or an exported one."""
    score: str | None = None
    """Of --by reward, in place of a model: a number that the records have, as 'score' or 'chosen_rating -
    rejected_rating'; an expression as --where of data mix."""
    similarity: str = "lexical"
    """Of --by diversity: a sentence-transformers folder, the name of one on the Hub, or lexical: pairs of
    words, without a model."""
    model: Path | None = None
    """Of --by domains: whose states; a model folder, an adapter, a name in the Hub cache, or a run."""
    domains: int = 8
    """Of --by domains: pseudo-domains, by k-means."""
    per: str | None = None
    """Keep so many of each value of this expression, as prompt (--keep 1: the best picture of each)."""
    score_name: str | None = None
    """The score's field in the records; default: BY_score. A second score needs another one."""
    seed: int = 0
    """Of --by diversity and domains: the first record; the first centres."""
    batch_size: int = 8
    """Of --reward and --model: records at once, over all devices."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        if self.reward is not None or self.model is not None:
            begin()
        from mllm_align.curation.select import Measured, select, told

        reward = None if self.reward is None else str(self.reward)
        options: dict[str, Any] = {"reward": reward, "score": self.score, "similarity": self.similarity}
        options |= {"model": None if self.model is None else str(self.model), "score_name": self.score_name}
        options |= {"domains": self.domains, "seed": self.seed}
        measured = Measured(self.by, **options, batch_size=self.batch_size)
        rest = {"keep": self.keep, "lowest": self.lowest, "per": self.per}
        found = select(self.files, self.out, measured, **rest, data=self.data)
        asked = {"files": self.files, "by": self.by, **options, **rest}
        log_beside(self.out, event="select", **asked, **found)
        print(told(measured, found))
        written(self.out)


@dataclass(frozen=True)
class DataFlip:
    """Pairs whose preference flips: mllm-align data flip FILE --out OUT

    Of records that have one prompt, the same images and different `preferences`, each gets the answer to
    another preference as its rejected response. Trained on such pairs, a model goes by the preference that
    is stated. Writes what `data mix` does, with `rejected_preferences`; OUT.log.jsonl says what came of it.
    """

    COMMON: ClassVar[tuple[str, ...]] = READING
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets with `preferences`, each as train takes it; the word --files may be left out."""
    out: Path
    """File to write, .jsonl or .parquet."""
    seed: int = 0
    """Which of several other answers is taken."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        from mllm_align.curation.flip import flip, told

        found = flip(self.files, self.out, seed=self.seed, data=self.data)
        log_beside(self.out, event="flip", files=self.files, seed=self.seed, **found)
        print(told(found))
        written(self.out)
