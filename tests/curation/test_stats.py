"""Figures of data sets, against counts by hand."""

import json

import pytest
from published import png, trl
from runs import MODEL, PAIRS, rows
from test_items import written

from mllm_align.config import DataConfig
from mllm_align.curation.stats import Tokens, statistics, summary, table
from mllm_align.models.bundle import Bundle
from mllm_align.models.processor import load_processor
from mllm_align.models.sources import open_model
from mllm_align.prepare import make_encoder, prepare


@pytest.fixture
def two(tmp_path):
    """Two sets that share an image under two names, and a pair."""
    (tmp_path / "a.png").write_bytes(png(4, 2))
    (tmp_path / "same.png").write_bytes(png(4, 2))
    (tmp_path / "b.png").write_bytes(png(6, 9))
    (tmp_path / "cut.png").write_bytes(png(6, 9)[:40])
    first = [
        trl(id="1", origin="coco"),
        trl(id="2", images=["same.png"], chosen="A small cat.", origin="vg"),
        trl(id="3", images=["b.png"], rejected="A dog in the sun."),
        trl(id="4", images=["cut.png"], rejected="A cat. "),
    ]
    second = [trl(id="1", images=["b.png"], prompt="Which?"), trl(id="5", images=["same.png"])]
    second += [{"prompt": "Hello?", "completion": "Hello."}]
    return written(tmp_path, *first, name="one.jsonl"), written(tmp_path, *second, name="two.jsonl")


def test_two_sets(two):
    found = statistics(two, DataConfig())
    one, other = found["sets"].values()
    assert (one["records"], one["identical"], one["without_rejected"]) == (4, 1, 0)
    assert (one["repeated_prompts"], one["repeated_responses"], one["different_images"]) == (1, 0, 3)
    assert (one["chosen_longer"], one["rejected_longer"]) == (0.25, 0.25)
    assert one["difference_words"]["mean"] == (0 + 1 - 3 + 0) / 4 and one["chosen_words"]["max"] == 3
    assert (one["image_width"]["min"], one["image_width"]["max"], one["image_height"]["max"]) == (4, 6, 9)
    assert one["unreadable_images"] == 1 and "cut.png" in one["first_unreadable"][0]
    assert one["fields"] == {"origin": {"coco": 1, "vg": 1}}
    assert (other["records"], other["without_rejected"], other["without_image"]) == (3, 1, 1)
    (both,) = found["overlap"]
    assert both == {"sets": ["one.jsonl", "two.jsonl"], "images": 2, "prompts": 1, "responses": 1}
    assert json.loads(json.dumps(found)) == found


def test_the_table(two):
    lines = table(statistics(two, DataConfig())).splitlines()
    assert lines[0].split() == ["one.jsonl", "two.jsonl"] and len({len(line) for line in lines[:10]}) == 1
    assert lines[1].split() == ["records", "4", "3"]
    assert (
        "in both one.jsonl and two.jsonl: 2 images, 1 prompts with their images, 1 pairs of responses"
        in lines
    )
    assert "one.jsonl, origin: coco 1, vg 1" in lines
    assert lines[-1].startswith("unreadable: one.jsonl record 3, images[0]")


def test_tokens_are_those_that_training_counts():
    folder = open_model(MODEL)
    bundle = Bundle(folder, load_processor(folder.path), None, None, {})
    _, records, _ = prepare(bundle, PAIRS, DataConfig(), 2)
    lengths = sorted(each.length for each in records)
    tokens = Tokens(make_encoder(bundle, DataConfig()), lengths[-1] - 1)
    (found,) = statistics([PAIRS], DataConfig(), tokens)["sets"].values()
    assert found["total_tokens"] == summary(lengths)
    assert found["chosen_tokens"]["mean"] == sum(len(each.responses[0]) for each in records) / len(rows())
    assert (
        found["over_limit"] == lengths.count(lengths[-1]) / len(lengths) and not found["tokens_not_counted"]
    )


def test_quantiles():
    assert summary([1, 2, 3, 10]) == {
        "mean": 4.0,
        "min": 1.0,
        "p5": 1.15,
        "p25": 1.75,
        "median": 2.5,
        "p75": 4.75,
        "p95": pytest.approx(8.95),
        "max": 10.0,
    }
