"""`mllm-align data ...`: makers of preference pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from mllm_align.cli.data import READING, first, written
from mllm_align.cli.judge import ANNOTATOR, Judge
from mllm_align.cli.shared import Data, PrintConfig, begin, log_beside
from mllm_align.config import DataConfig, JudgeConfig, to_json
from mllm_align.config.servers import Writer
from mllm_align.errors import InputError

WRITER = ("writer.url", "writer.name", "writer.model", "writer.max-tokens", "writer.concurrency")
WRITER += ("writer.budget", "writer.batch-size")


@dataclass(frozen=True)
class DataCorrupt:
    """Rejected responses that an LLM writes from the chosen ones: mllm-align data corrupt FILE --out OUT.

    The writer is shown no image, and is asked to change objects, attributes, counts, positions or
    relations, each for a fifth of the records. What it writes is checked, and asked for again up to two
    times; records without a usable answer are left out and counted. Writes pairs as `data mix` does, with
    `corruption`: the kind of change that was asked for, tries, writer. Answers are kept beside OUT: the
    same command continues, and asks nothing twice. OUT.log.jsonl says what was asked and what came of it.
    """

    COMMON: ClassVar[tuple[str, ...]] = (*WRITER, *READING)
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets with a response each, as train takes them; the word --files may be left out. A rejected
    response that is there is replaced."""
    out: Path
    """File to write, .jsonl or .parquet."""
    seed: int = 0
    """Which kind of change is asked for of which record."""
    writer: Writer = field(default_factory=Writer)
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        if self.writer.model is not None:
            begin()
        from mllm_align.curation.corrupt import corrupt, told

        found = corrupt(self.files, self.out, self.writer, seed=self.seed, data=self.data)
        _tell_written(self, "corrupt", {"seed": self.seed, **found}, told(self.out, found))


@dataclass(frozen=True)
class DataRewrite:
    """Chosen responses in an LLM's own words, reviewed by it: mllm-align data rewrite FILE --out OUT

    The last step of a cascaded curation (Align2LLaVA), after `data select`. The writer is shown no image;
    it is asked to keep all that a response says, and then whether the new one does. What it does not
    approve is written again up to two times; then the record keeps its response. Writes records as `data
    mix` does, with `rewrite`: approved, the original, writer. Answers are kept beside OUT: the same command
    continues, and asks nothing twice. OUT.log.jsonl says what was asked and what came of it.
    """

    COMMON: ClassVar[tuple[str, ...]] = (*WRITER, *READING)
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets with a response each, as train takes them; the word --files may be left out."""
    out: Path
    """File to write, .jsonl or .parquet."""
    writer: Writer = field(default_factory=Writer)
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        if self.writer.model is not None:
            begin()
        from mllm_align.curation.rewrite import rewrite, told

        found = rewrite(self.files, self.out, self.writer, data=self.data)
        _tell_written(self, "rewrite", found, told(self.out, found))


def _tell_written(verb: DataCorrupt | DataRewrite, event: str, found: dict[str, Any], text: str) -> None:
    """Log and tell what a writer made."""
    writer = {name: getattr(verb.writer, name) for name in ("url", "name", "model")}
    log_beside(verb.out, event=event, files=verb.files, writer=writer, **found)
    print(text)
    written(verb.out)


@dataclass(frozen=True)
class DataRetrieve:
    """Records with the most similar other images: mllm-align data retrieve FILE --model DIR --out OUT

    Images are compared by the mean of the model's vision features (Re-Align). Each record gets
    rejected_images, the nearest neighbour of each image, neighbour_images, all neighbours, and
    neighbour_similarity, their cosines. `bdhs --distortion retrieved` has the model write rejected
    responses under them. Vectors are kept in a folder: the same command continues. Writes what `data mix`
    does; OUT.log.jsonl says what was asked and what came of it.
    """

    COMMON: ClassVar[tuple[str, ...]] = READING
    place = first("--files")

    files: tuple[Path, ...]
    """Data sets, each as train takes it; the word --files may be left out."""
    model: Path
    """Whose vision tower: a Hugging Face model folder, PEFT adapter folder, the name of either in the local
    Hub cache, or a run folder."""
    out: Path
    """File to write, .jsonl or .parquet; in Parquet lie the neighbours' bytes, too."""
    neighbours: int = 5
    """Of each image; the same picture under another name is none."""
    pool: tuple[Path, ...] = ()
    """Data sets whose images may be neighbours; default: the records' own."""
    index: Path | None = None
    """Folder of the vectors, which several commands may share; default: OUT with suffix .index."""
    batch_size: int = 8
    """Images at once, over all devices."""
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        begin()
        from mllm_align.curation.retrieve import retrieve, told

        options = {"neighbours": self.neighbours, "pool": self.pool, "index": self.index}
        found = retrieve(
            self.files, self.out, self.model, **options, batch_size=self.batch_size, data=self.data
        )
        log_beside(self.out, event="retrieve", files=self.files, model=self.model, **options, **found)
        print(told(found))
        written(self.out)


@dataclass(frozen=True)
class DataPair:
    """Pairs of the best and the worst of candidate responses, by an annotator's scores.

    The annotator is chosen and set as of `judge`: a reward model, a judge, an endpoint, your own scorer.
    Candidates are what `generate --data FILE --out` wrote, of one model or several; without --responses,
    the responses that each record has. Writes pairs as `data mix` does, with chosen_score, rejected_score,
    scores, and who wrote them. Scores are kept as they come: the same command continues. OUT.log.jsonl says
    what was asked and what came of it.
    """

    COMMON: ClassVar[tuple[str, ...]] = (*ANNOTATOR, *READING)

    config_file: Positional[Path]
    """Name of a config (mllm-align configs), a Python file whose get_config() gives a JudgeConfig or the
    Config of a run that has an annotator, or a YAML file of either."""
    data_file: Data
    """Prompts with images: a data set as train takes it."""
    out: Path
    """File to write, .jsonl or .parquet."""
    responses: tuple[Path, ...] = ()
    """Files that `generate` wrote for the same data, one for each model."""
    margin: float = 0.0
    """Least difference of the best and the worst score; pairs below it are left out."""
    model: Path | None = None
    """The policy's base, as `train` takes it; needed where the annotator is it."""
    print_config: PrintConfig = None
    """Print the resolved config and stop, as JSON unless yaml is given; needs no other option."""
    config: Annotated[JudgeConfig, arg(name="")] = field(default_factory=JudgeConfig)

    load = staticmethod(Judge.load)

    def __call__(self) -> None:
        begin(self.config.distributed)
        from mllm_align.curation.pair import pair, told
        from mllm_align.models.bundle import load
        from mllm_align.prepare import name_weights
        from mllm_align.training.run_model import open_base

        asked, folder, base = self.config.annotator, None, None
        if asked.asks_base and self.model is None:
            raise InputError("data pair needs --model: the annotator is the policy's own base")
        named = self.model if asked.asks_base else asked.model_folder
        if named is not None:
            folder = open_base(named)
            name_weights(folder)
        if folder is not None and asked.asks_base:
            base = load(folder, self.config.dtype, self.config.mesh)
        found = pair(
            self.data_file,
            self.out,
            self.config,
            responses=self.responses,
            margin=self.margin,
            base=base,
            model=None if folder is None else folder.fingerprint,
        )
        options = {"data": self.data_file, "responses": self.responses, "margin": self.margin}
        log_beside(self.out, event="pair", **options, annotator=to_json(asked), **found)
        print(told(found))
        written(self.out)
