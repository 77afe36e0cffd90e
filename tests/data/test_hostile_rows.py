"""Rows and files that nobody meant: they give records or one line, and never another error."""

import copy
import json
import random
from collections import Counter
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from published import ROWS, human, in_columns, sharegpt, vlfeedback

from mllm_align.data.images import ImageSource, image_size
from mllm_align.data.readers import records_from
from mllm_align.errors import InputError

SEEDS = {**ROWS, "talk": sharegpt, "columns": lambda: columns(), "messages": lambda: messages()}


def columns():
    row = vlfeedback()
    return {**row, "completions": in_columns(row["completions"][0], row["completions"])}


def messages():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    return {
        "prompt": [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
    }


def nested(depth):
    value: object = "x"
    for _ in range(depth):
        value = [value] if depth % 2 else {"value": value}
    return value


ODD = [
    *(None, True, False, 0, -1, 2**70, 10**400, float("nan"), float("inf"), -0.0, 1.5),
    *(
        "",
        " ",
        "\ud800",
        "\0",
        "<image>",
        "<image><image>",
        "x" * 100_000,
        "/9j/" * 5000,
        "data:,",
        "data:;base64,",
    ),
    *("http://a.org/b.png", "../" * 50, "user", "gpt", "N/A", "{", "[]", '{"question": 7}', "9" * 5000),
    *([], {}, [[]], [None], [7], [{}], {"from": "gpt"}, {"bytes": None, "path": None}, {"bytes": "QUJD"}),
    *(
        {"value": []},
        {"path": "\ud800"},
        {"url": {}},
        {1: 2},
        [human("x")],
        b"",
        b"\xff",
        (),
        {"x"},
        object(),
    ),
    *(nested(5), nested(6), np.zeros((2, 2), np.uint8), np.zeros(3), Image.new("RGB", (2, 2)), np.int64(3)),
]


def places(value, at=()):
    """The way to each value inside a row."""
    yield at
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, each in items:
        yield from places(each, (*at, key))


def mutated(row, draw):
    """A row with one to three things changed: another value, a field gone, two swapped, one wrapped."""
    for _ in range(draw.randint(1, 3)):
        ways = [way for way in places(row) if way]
        if not ways:
            return row
        *way, last = draw.choice(ways)
        parent = row
        for step in way:
            parent = parent[step]
        kind = draw.choice(("odd", "odd", "odd", "drop", "swap", "wrap", "extra"))
        if kind == "odd":
            parent[last] = copy.deepcopy(draw.choice(ODD[:-8])) if draw.random() < 0.7 else draw.choice(ODD)
        elif kind == "drop":
            del parent[last]
        elif kind == "swap":
            other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[last], parent[other] = parent[other], parent[last]
        elif kind == "wrap":
            parent[last] = draw.choice(([parent[last]], {"value": parent[last]}, {"bytes": parent[last]}))
        else:
            row[draw.choice(("prompt", "messages", "images", "question", "text", "output_1", "chosen"))] = (
                draw.choice(ODD)
            )
    return row


def outcome(rows, **options):
    """'records' or 'refused', in one line; anything else is a failure."""
    try:
        for record in records_from(rows, **options):
            assert record.id and all(isinstance(text, str) for text in record.responses)
            for source in record.images:
                assert isinstance(source, ImageSource)
                try:
                    image_size(source)
                except InputError as error:
                    assert "\n" not in str(error)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 2100
        return "refused"
    return "records"


def written(row, folder):
    """The row in a file of each kind that can hold it."""
    with suppress(TypeError, ValueError):
        (folder / "a.jsonl").write_text(json.dumps(row))
        yield folder / "a.jsonl"
    with suppress(TypeError, ValueError, OverflowError, AttributeError, pa.ArrowException):
        pq.write_table(pa.Table.from_pylist([row]), folder / "a.parquet")
        yield folder / "a.parquet"


def fuzz(count, folder):
    draw, told = random.Random(7), Counter()
    for number in range(count):
        name = list(SEEDS)[number % len(SEEDS)]
        row = mutated(copy.deepcopy(SEEDS[name]()), draw)
        options = {"responses": draw.choice((0, 1, 2, 3)), "pairs": draw.choice(("all", "best-worst"))}
        format = draw.choice(("auto", name if name in ROWS else "auto", draw.choice(list(ROWS))))
        told[outcome([row], format=format, **options)] += 1
        for file in written(row, folder):
            told[outcome(file, format=format, **options)] += 1
    return told


def test_changed_rows(tmp_path):
    told = fuzz(200, tmp_path)
    assert told["records"] > 20 and told["refused"] > 100


@pytest.mark.slow
def test_many_changed_rows(tmp_path):
    told = fuzz(800, tmp_path)
    assert told["records"] > 80 and told["refused"] > 400
    print(dict(told))


def test_changed_bytes_of_json_lines(tmp_path):
    noise = np.random.default_rng(0)
    whole = "".join(json.dumps(ROWS["trl"](id=i)) + "\n" for i in range(20)).encode()
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[noise.integers(len(whole))] = noise.integers(256)
        (tmp_path / "a.jsonl").write_bytes(damaged)
        outcome(tmp_path / "a.jsonl")
