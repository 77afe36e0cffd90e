"""A record in words: counts, loss, positions."""

import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from goldens import FIXTURES, NAMES, goldens

from mllm_align.batch import pad
from mllm_align.data.encode import Encoder
from mllm_align.data.inspect import describe, text
from mllm_align.data.records import parse_record
from mllm_align.errors import InputError
from mllm_align.models.processor import load_processor

PAIRS = [json.loads(line) for line in (FIXTURES / "pairs.jsonl").read_text().splitlines()]
TWO = {**PAIRS[0], "images": ["images/3_RGB.png", "images/1_P.png"], "prompt": "<image>gi <image> ku?"}
TEXT_ONLY = {key: value for key, value in PAIRS[0].items() if key != "images"}
ROWS = {**{str(i): row for i, row in enumerate(PAIRS)}, "two images": TWO, "text": TEXT_ONLY}


@cache  # reading a processor takes longer than most tests here
def encoder_of(name):
    golden = goldens(name)
    return Encoder(load_processor(golden.folder.path), golden.layout, golden.config.image_token)


def encoded(name, row, root=FIXTURES):
    encoder = encoder_of(name)
    record = parse_record(row, index=2, where="pairs.jsonl record", root=root)
    return encoder, encoder.encode(record, 2)


# LLaVA-1.5 makes one tile of a picture, whatever its size
SOME = [
    (name, row) for name in NAMES for row in ROWS if name != "llava15" or not row.isdigit() or row == "0"
]


@pytest.mark.parametrize("name, row", SOME)
def test_counts_positions_and_loss(name, row):
    encoder, one = encoded(name, ROWS[row])
    group = encoder.group(one)
    told = describe(encoder, one)
    assert told["prefix_tokens"] == len(group.prefix.tokens) == one.shape.prefix
    assert told["response_tokens"] == [len(ids) for ids in group.responses]
    assert told["pixels"]["shape"] == list(group.prefix.patches.shape)

    # the prefix: positions without a gap, every embedding in its run, no loss
    spans = [entry["positions"] for entry in told["prefix"]]
    assert spans[0][0] == 0 and spans[-1][1] == told["prefix_tokens"] - 1
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(spans))
    for entry in told["prefix"]:
        first, last = entry["positions"]
        assert entry["loss"] == 0 and set(group.prefix.tokens[first : last + 1]) == {entry["id"]}
        image = group.prefix.image[first : last + 1]
        if entry["text"] == "image_newline":
            assert (image == 0).all()
        elif entry["text"].startswith("tile "):
            assert set((image - 1) // encoder.layout.tokens) == {int(entry["text"].removeprefix("tile "))}
        else:
            assert first == last and image.tolist() == [-1]
            assert entry["text"] == encoder.tokenizer.convert_ids_to_tokens(entry["id"])

    # the responses: the model's own positions, loss on each token
    padded = pad([group], group.shape, 1)
    mask = padded.responses.mask[0]
    positions = np.asarray(padded.prefix.after(mask.shape[-1])[1])[0]
    for k, entries in enumerate(told["responses"]):
        assert [e["id"] for e in entries] == group.responses[k].tolist()
        assert [e["positions"] for e in entries] == [[p, p] for p in positions[0][mask[k]]]
        assert all(e["loss"] == 1 for e in entries) and entries[-1]["text"] == "</s>"


@pytest.mark.parametrize("name", NAMES)
def test_images(name):
    encoder, one = encoded(name, TWO)
    told = describe(encoder, one)
    assert [(i["width"], i["height"]) for i in told["images"]] == list(one.sizes) == [(120, 36), (40, 100)]
    assert sum(i["tiles"] for i in told["images"]) == told["pixels"]["shape"][0]
    embeddings = sum(e["positions"][1] - e["positions"][0] + 1 for e in told["prefix"] if e["id"] == 4)
    assert sum(i["embeddings"] for i in told["images"]) == embeddings
    newlines = [e for e in told["prefix"] if e["text"] == "image_newline"]
    assert sum(i["newlines"] for i in told["images"]) == len(newlines)
    tiles = {e["text"] for e in told["prefix"] if e["text"].startswith("tile ")}
    assert tiles == {f"tile {i}" for i in range(told["pixels"]["shape"][0])}
    if name == "llava15":
        assert [i["grid"] for i in told["images"]] == [None, None] and not newlines
    else:
        assert [i["grid"] for i in told["images"]] == [[1, 3], [2, 1]] and newlines
    assert told["pixels"]["min"] < 0 < told["pixels"]["max"]
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("name", NAMES)
def test_text_of_a_record(name):
    encoder, one = encoded(name, PAIRS[3])
    lines = text(describe(encoder, one)).splitlines()
    assert lines[0] == "record 2  (pairs.jsonl record 2)"
    assert lines[1].startswith("image 0: pairs.jsonl record 2, images[0] (")
    assert (
        "120 x 36 pixels" in lines[1]
        and ("1 tiles" if name == "llava15" else "4 tiles = 1 + 1 x 3") in lines[1]
    )
    a, b = (len(ids) for ids in one.responses)
    assert f"tokens: prefix {one.shape.prefix}, responses {a} + {b}" in lines
    assert any(line.endswith("'tile 0'") and "4     0" in line for line in lines)
    starts = [lines.index(head) for head in ("-- prefix", "-- response 0", "-- response 1")]
    assert starts[2] - starts[1] == a + 1 and len(lines) - starts[2] == b + 1
    loss = [line.split()[2] for line in lines[starts[1] + 1 :] if not line.startswith("--")]
    assert loss == ["1"] * (a + b)


@pytest.mark.parametrize("name", NAMES)
def test_text_of_a_record_without_images(name):
    encoder, one = encoded(name, TEXT_ONLY)
    told = describe(encoder, one)
    assert told["images"] == [] and told["pixels"] == {"shape": [0, 16, 588], "min": None, "max": None}
    lines = text(told).splitlines()
    assert lines[0] == "record 2  (pairs.jsonl record 2)" and lines[1].startswith("tokens: prefix ")
    assert not any("tile" in line or "pixels" in line for line in lines)


def test_a_damaged_image_shows(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes((FIXTURES / "images/3_RGB.png").read_bytes())
    encoder, one = encoded("llavanext", {**PAIRS[3], "images": ["a.png"]}, tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=r"pairs.jsonl record 2, images\[0\].*a.png.*cut short"):
        describe(encoder, one)
