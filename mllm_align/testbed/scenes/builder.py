"""The scenes as a data set on disk, in the format of TensorFlow Datasets (TensorFlow is not needed)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from mllm_align.errors import InputError, one_line, quoted, refusal
from mllm_align.testbed.scenes.draw import picture
from mllm_align.testbed.scenes.language import QA, training_rows
from mllm_align.testbed.scenes.world import LESSONS, SPLITS, Scene, Settings, make_scene

_CONFIG = "default"
_REMOVE = "remove the folder or give another one"


@dataclass(frozen=True)
class Example:
    """One picture (PNG bytes), its scene, and questions with answers about it."""

    id: str
    png: bytes
    scene: Scene
    qas: tuple[QA, ...]


@dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
    settings: Settings = Settings()


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Synthetic pictures with true captions, questions and answers."""

    VERSION = tfds.core.Version("2.0.0")
    builder_config: ScenesConfig
    code_path = None  # there are no files beside the code; a search would need `importlib_resources`

    def _info(self) -> tfds.core.DatasetInfo:
        texts = tfds.features.Sequence(tfds.features.Text())
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "scene": tfds.features.Text(),
            "question": texts,
            "answer": texts,
            "kind": texts,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(asdict(self.builder_config.settings)),
            disable_shuffling=True,  # examples stay in the order of their numbers
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        settings = self.builder_config.settings
        return {split: self._generate_examples(split) for split in SPLITS if settings.size(split)}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        settings = self.builder_config.settings
        for index in range(settings.size(split)):
            example = make_example(split, index, settings)
            yield (
                index,
                {
                    "id": example.id,
                    "image": io.BytesIO(example.png),  # encoded bytes; an array would need TensorFlow
                    "scene": example.scene.to_json(),
                    "question": [qa.question for qa in example.qas],
                    "answer": [qa.answer for qa in example.qas],
                    "kind": [qa.kind for qa in example.qas],
                },
            )


def make_example(split: str, index: int, settings: Settings) -> Example:
    """Return one example: a pure function of its arguments."""
    scene = make_scene(split, index, settings)
    # A separate stream, so that the texts are independent of the random draws of the scene.
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), index, 1])
    buffer = io.BytesIO()
    grain, fog = (0.0, 0.0) if split in LESSONS else (settings.grain, settings.fog)
    picture(scene, grain, settings.seed, fog).save(buffer, "PNG", compress_level=1)
    return Example(scene.id, buffer.getvalue(), scene, tuple(training_rows(scene, rng)))


def prepare(folder: str | os.PathLike, settings: Settings) -> tfds.core.DatasetBuilder:
    """Return the data set in `folder`; write it there first, as ArrayRecord, if it does not exist.

    An interrupted run leaves nothing that a later run would mistake for the data. Raises InputError if the
    folder has data of other settings, or cannot be read or written.
    """
    if not _home(folder).exists():
        _write(folder, settings)
    builder = _open(folder)
    there = builder.info.metadata or {}
    others = [
        f"{name} {there.get(name, 'unknown')}"
        for name, value in asdict(settings).items()
        if there.get(name) != value
    ]
    if others:
        raise refusal(f"scenes, folder {folder}", f"holds pictures of {', '.join(others)}", _REMOVE)
    return builder


def read(source: str | os.PathLike | tfds.core.DatasetBuilder, split: str) -> grain.MapDataset[Example]:
    """Return the examples of a split in order, read on demand.

    source: the result of `prepare`, or its folder. Raises InputError if the folder cannot be read or has no
    such split.
    """
    builder = source if isinstance(source, tfds.core.DatasetBuilder) else _open(source)
    if split not in builder.info.splits:
        there = ", ".join(builder.info.splits)
        raise InputError(f"scenes, split: {quoted(split)} has no pictures; give one of {there}")
    try:
        as_stored = {"image": tfds.decode.SkipDecoding()}
        rows = builder.as_data_source(split, decoders=as_stored)  # type: ignore[call-arg]
        rows[0]  # files are opened at the first access; a truncated one fails here
    except Exception as error:
        raise _damaged(builder.data_path, error) from error
    return grain.MapDataset.source(rows).map(_example)


def sft_rows(examples: Iterable[Example], kinds: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Return one record per question (only of these `kinds`, if given), with the picture's bytes."""
    return [
        {
            "id": f"{example.id}-{number}",
            "images": [{"bytes": example.png}],
            "prompt": qa.question,
            "completion": qa.answer,
        }
        for example in examples
        for number, qa in enumerate(example.qas)
        if kinds is None or qa.kind in kinds
    ]


def write_files(examples: Iterable[Example], folder: str | os.PathLike, name: str) -> Path:
    """Write `name`.jsonl, one record per question, and the pictures under images/; return its path.

    Raises InputError if the folder cannot be written.
    """
    folder = Path(folder)
    lines = []
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for example in examples:
            image = f"images/{example.id}.png"
            (folder / image).write_bytes(example.png)
            for number, qa in enumerate(example.qas):
                row = {"id": f"{example.id}-{number}", "image": image, "prompt": qa.question}
                lines.append(json.dumps(row | {"chosen": qa.answer}) + "\n")
        path = folder / f"{name}.jsonl"
        partial = folder / f".{name}.jsonl.partial"
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)  # last and atomic: if the file exists, everything is complete
    except OSError as error:
        raise refusal(
            f"scenes, folder {folder}", one_line(error), "give one that can be written"
        ) from error
    return path


def _home(folder: str | os.PathLike) -> Path:
    """The folder that TensorFlow Datasets gives this data set inside `folder`."""
    return Path(folder) / "scenes" / _CONFIG / str(Scenes.VERSION)


def _write(folder: str | os.PathLike, settings: Settings) -> None:
    config = ScenesConfig(name=_CONFIG, settings=settings)
    try:
        with _quiet(), tempfile.TemporaryDirectory() as downloads:
            builder = Scenes(data_dir=os.fspath(folder), config=config, file_format="array_record")
            builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        # If another process was faster, its data are used.
        if not _home(folder).exists():
            raise refusal(f"scenes, folder {folder}", one_line(error), _REMOVE) from error


def _open(folder: str | os.PathLike) -> tfds.core.DatasetBuilder:
    if not _home(folder).exists():
        raise refusal(f"scenes, folder {folder}", "holds no pictures", "prepare them first")
    try:
        builder = tfds.builder_from_directory(_home(folder))
        _ = builder.info.metadata  # read at the first access
        return builder
    except Exception as error:  # a damaged file raises almost anything
        raise _damaged(folder, error) from error


def _damaged(folder: str | os.PathLike, error: Exception) -> InputError:
    return refusal(f"scenes, folder {folder}", f"cannot be read ({one_line(error)})", _REMOVE)


def _example(row: dict[str, Any]) -> Example:
    texts = zip(row["question"], row["answer"], row["kind"], strict=True)
    qas = tuple(QA(*(text.decode() for text in qa)) for qa in texts)
    return Example(row["id"].decode(), row["image"], Scene.from_json(row["scene"].decode()), qas)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of TensorFlow Datasets on stdout and in the log."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
