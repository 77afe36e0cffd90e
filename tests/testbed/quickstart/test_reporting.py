"""What the quickstart's page shows, from made-up runs and pairs."""

import json

import pytest

pytest.importorskip("tensorflow_datasets")

from mllm_align.testbed.quickstart import reporting
from mllm_align.testbed.quickstart.reporting import written_spans

CHOSEN = "Yes, there is a cup. We see a red key. No, there is no hat."


def sentence(text, kept, written, swapped=None):
    """What BDHS records of a sentence of CHOSEN that was kept up to `kept` and written anew from there."""
    start = CHOSEN.index(text)
    return {
        "sentence": [start, start + len(text)],
        "cut": start + len(kept),
        "written": written,
        "swapped": swapped,
    }


ONE = ("Yes, there is a cup.", "Yes, there")
TWO = ("We see a red key.", "We see a")
THREE = ("No, there is no hat.", "No, there is")


@pytest.mark.parametrize(
    ("sentences", "rejected"),
    [
        ([], CHOSEN),
        (
            [sentence(*ONE, " are two keys.")],
            "Yes, there are two keys. We see a red key. No, there is no hat.",
        ),
        (
            [sentence(*TWO, " moon.")],
            "Yes, there is a cup. We see a moon. No, there is no hat.",
        ),
        (
            [sentence(*ONE, " is no cup.", ["Yes", "No"])],
            "No, there is no cup. We see a red key. No, there is no hat.",
        ),
        (
            [
                sentence(*ONE, " is none.", ["Yes", "No"]),
                sentence(*TWO, " large blue lock."),
                sentence(*THREE, " a boot", ["No", "Yes"]),
            ],
            "No, there is none. We see a large blue lock. Yes, there is a boot",
        ),
        (
            [sentence(*ONE, " is.", ["Yes", "No"]), sentence(*THREE, "", ["No", "Yes"])],
            "No, there is. We see a red key. Yes, there is",
        ),
    ],
)
def test_written_spans_hold_what_was_written(sentences, rejected):
    spans = written_spans({"rejected": rejected, "bdhs": {"sentences": sentences}})
    assert [rejected[a:b] for a, b in spans] == [each["written"] for each in sentences]


def test_curves_of_a_run_that_was_begun_twice(tmp_path):
    for name in ("sft", "aligned"):
        lines = [{"event": "start", "step": 0}]
        for begun in (3.0, 2.0):
            values = [(1, begun), (50, begun / 2)]
            lines += [{"event": "train", "step": s, "loss": v, "rewards/margin": v} for s, v in values]
        lines.append({"event": "train", "step": 100, "loss": 0.5, "rewards/margin": 0.5})
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for curve in reporting._curves(tmp_path):
        assert list(curve.series.values()) == [[(1, 2.0), (50, 1.0), (100, 0.5)]]
