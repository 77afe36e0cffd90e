"""The stored models' encoders, and records for them."""

from __future__ import annotations

import json
from functools import cache

from goldens import FIXTURES, goldens

from mllm_align.data.encode import Encoder
from mllm_align.data.records import parse_record
from mllm_align.models.processor import load_processor

PAIRS = [json.loads(line) for line in (FIXTURES / "pairs.jsonl").read_text().splitlines()]
TEXT_ONLY = {"prompt": "gi dan?", "chosen": "tuku der.", "rejected": "poge ku."}


@cache
def processor(name="llava15"):
    return load_processor(FIXTURES / name)


def encoder(name="llava15", template=None, processor=processor):
    golden = goldens(name)
    return Encoder(processor(name), golden.layout, golden.config.image_token, template=template)


def record(row=TEXT_ONLY, responses=2, root=FIXTURES, **changes):
    """A record of the fourth row of a file, some of its fields changed."""
    row = {**row, **changes}
    return parse_record(row, index=3, where="pairs.jsonl record", root=root, responses=responses)
