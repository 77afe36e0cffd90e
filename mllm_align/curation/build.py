"""Records as a data set of tensorflow-datasets, in ArrayRecord files; TensorFlow is not needed."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mllm_align.config import DataConfig
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.writing import encoded, rows_of
from mllm_align.data.array_records import FIELDS
from mllm_align.data.mixture import set_names
from mllm_align.files import json_text, new_folder
from mllm_align.progress import progress_bar

OURS = ("id", "images", "prompt", "chosen", "rejected", "responses", "source")


class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Preference pairs, or SFT records, with their images.

    There is no null: a record without a rejected response has an empty one. `fields` is a JSON object of
    whatever else the rows said. In the text of a prompt, <image> and a line break mark an image's place.
    """

    name = "pairs"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no files beside the code; a search would need `importlib_resources`

    def __init__(self, items: Iterator[Item], folder: Path):
        self._items = items
        super().__init__(data_dir=str(folder), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        features = dict.fromkeys(("id", "chosen", "rejected", "source", "fields"), text)
        features |= {"responses": texts, "images": tfds.features.Sequence(tfds.features.Image())}
        features["prompt"] = tfds.features.Sequence({"role": text, "content": text})
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict({FIELDS: "fields"}),
            disable_shuffling=True,  # records stay in their order
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        # as encoded bytes in a file: an array would need TensorFlow
        for number, row in enumerate(rows_of(self._items, lambda source: io.BytesIO(encoded(source)))):
            example = {name: row.get(name, "") for name in OURS}
            example["prompt"] = [
                {"role": turn["role"], "content": "".join(map(_text, turn["content"]))}
                for turn in row["prompt"]
            ]
            example["responses"] = row.get("responses", [])
            further = {name: value for name, value in row.items() if name not in OURS}
            yield number, example | {"fields": json_text(further) if further else ""}


def _text(part: dict[str, str]) -> str:
    return part.get("text", "<image>\n")


def build(files: Sequence[Path], out: Path, data: DataConfig | None = None) -> int:
    """Write the records of data sets, in order, as one data set in the folder `out`, whole or not at all.

    Its one split is `train`. Returns the number of records. Raises InputError for data or images that can't
    be read, and for a folder that is not empty or can't be written.
    """
    config, names = data or DataConfig(), set_names(files)
    count = sum(1 for name, file in names.items() for _ in read_items(file, name, config))
    with new_folder(out) as made, progress_bar(count, "building") as bar:

        def items() -> Iterator[Item]:
            for name, file in names.items():
                for item in read_items(file, name, config):
                    yield item
                    bar.update()

        with tempfile.TemporaryDirectory(dir=made) as place, quiet():
            builder = Pairs(items(), Path(place))
            builder.download_and_prepare(download_dir=place)
            for file in Path(builder.data_dir).iterdir():
                file.rename(made / file.name)
    return count


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages of tensorflow-datasets on stdout and in the log."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
