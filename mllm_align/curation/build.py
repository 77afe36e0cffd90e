"""Records as a data set of tensorflow-datasets, in ArrayRecord files; TensorFlow is not needed.

Written by its `SequentialWriter`: a builder's `download_and_prepare` collects examples to shuffle them, and
needs TensorFlow for more than a gigabyte.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mllm_align.config import DataConfig
from mllm_align.curation.items import Item, read_items
from mllm_align.curation.writing import IMAGES, encoded, rows_of
from mllm_align.data.array_records import FIELDS
from mllm_align.data.mixture import set_names
from mllm_align.files import json_text, new_folder
from mllm_align.progress import progress_bar

SHARD = 10_000  # most records of a file
ABOUT = """Preference pairs, or SFT records, with their images. There is no null: a record without a
rejected response has an empty one. `fields` is a JSON object of whatever else the rows said. In the text of
a prompt, <image> and a line break mark an image's place."""
IMAGE = "<image>\n"
OURS = ("id", *IMAGES, "prompt", "chosen", "rejected", "responses", "source")


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

        writer = tfds.core.SequentialWriter(_info(made), SHARD, file_format="array_record")
        writer.initialize_splits(["train"])
        examples: Any = _examples(items())  # one by one
        writer.add_examples({"train": examples})
        writer.close_all()
    return count


def _info(folder: Path) -> tfds.core.DatasetInfo:
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    features = dict.fromkeys(("id", "chosen", "rejected", "source", "fields"), text)
    features |= {"responses": texts}
    features |= dict.fromkeys(IMAGES, tfds.features.Sequence(tfds.features.Image()))
    features["prompt"] = tfds.features.Sequence({"role": text, "content": text})
    name, version = "pairs", tfds.core.Version("1.0.0")
    return tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(name, version, str(folder), __name__),
        description=ABOUT,
        features=tfds.features.FeaturesDict(features),
        metadata=tfds.core.MetadataDict({FIELDS: "fields"}),
        disable_shuffling=True,  # records are in their order
    )


def _examples(items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    # images as encoded bytes in a file: an array would need TensorFlow
    for row in rows_of(items, lambda source: io.BytesIO(encoded(source))):
        example = {name: row.get(name, "") for name in OURS}
        example["prompt"] = [
            {"role": turn["role"], "content": "".join(part.get("text", IMAGE) for part in turn["content"])}
            for turn in row["prompt"]
        ]
        example |= {name: row.get(name, []) for name in ("responses", *IMAGES)}
        further = {name: value for name, value in row.items() if name not in OURS}
        yield example | {"fields": json_text(further) if further else ""}
