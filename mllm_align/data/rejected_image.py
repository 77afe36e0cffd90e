"""The second prefix of a record: its prompt with a rejected image, which the chosen response continues.

What it shows is one of `align.contract.REJECTED_IMAGES`. A crop and noise are made of the record's own
images when pixels are read (`Encoder.pixels`), by numbers that follow from the seed, the record's id and
the pass over the data alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mllm_align.data.encode import Encoded
from mllm_align.data.records import Record
from mllm_align.errors import refusal


def rejected_record(record: Record, kind: str) -> Record:
    """The record as its second prefix shows it. Raises InputError for one without an image, or without the
    rejected images that `kind` wants."""
    if not record.images:
        problem = "has no image, and the objective compares images"
        raise refusal(
            record.where, problem, "give one, or take an objective on responses alone, such as dpo"
        )
    if kind != "record":
        return replace(record, rejected_images=())
    if not record.rejected_images:
        remedy = "give one for each image, or take --objective.rejected-image crop"
        raise refusal(f"{record.where}, rejected_images", "is missing", remedy)
    return replace(record, images=record.rejected_images, rejected_images=())


def with_second(encoded: Encoded, kind: str, other: Encoded | None) -> Encoded:
    """The record with its second prefix. other: the record of `rejected_record` encoded, where it shows
    images of its own; else they have the sizes of the record's."""
    shown = replace(encoded, record=rejected_record(encoded.record, kind), shown=kind)
    if other is not None:
        if not all(map(np.array_equal, other.responses, encoded.responses)):
            problem = "its responses are tokenized otherwise after the rejected images"
            raise refusal(encoded.record.where, problem, "let text stand between image and answer")
        shown = other
    responses = shown.responses[:1]
    shape = replace(shown.shape, response=max(map(len, responses), default=0))
    second = replace(shown, responses=responses, shape=shape)
    return replace(
        encoded, second=second, shape=replace(encoded.shape, others=((shape.prefix, shape.tiles),))
    )
