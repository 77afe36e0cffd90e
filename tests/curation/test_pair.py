"""Which candidates become a pair, by an annotator whose scores are told."""

import json
from dataclasses import dataclass

import pytest
from published import trl
from refusals import assert_refusal
from test_items import read, written

from mllm_align import Verdict, scored
from mllm_align.config import AnnotatorConfig, DataConfig, JudgeConfig
from mllm_align.curation.pair import pair, told
from mllm_align.data.readers import records_from


@dataclass(frozen=True)
class Digits(AnnotatorConfig):
    """A response's score is the number in it; x fails. asked: how many questions were asked."""

    asked = []
    breaks: int = 0

    def open(self, context):
        return self.answer

    def answer(self, questions):
        self.asked.append(len(questions))
        if len(self.asked) == self.breaks:
            raise KeyboardInterrupt
        return [self.verdict(each.responses) for each in questions]

    @staticmethod
    def verdict(responses):
        if any("x" in text for text in responses):
            return Verdict("failed")
        return scored([float(text.split()[-1]) for text in responses])


@pytest.fixture(autouse=True)
def asked():
    Digits.asked.clear()
    return Digits.asked


def generated(folder, name, *responses):
    lines = [{"index": i, "id": f"r{i}", "responses": each} for i, each in enumerate(responses)]
    return written(folder, *lines, name=name)


def prompts(folder, count, **fields):
    rows = [{"id": f"r{i}", "prompt": "What?", "images": [], **fields} for i in range(count)]
    return written(folder, *rows, name="prompts.jsonl")


def made(data, responses=(), config=None, **options):
    out = data.with_name("pairs.jsonl")
    return pair(data, out, config or JudgeConfig(Digits()), responses=responses, **options), read(out)


def test_the_best_against_the_worst_of_several_models(tmp_path):
    data = prompts(tmp_path, 6, origin="coco")
    files = (
        generated(tmp_path, "one.jsonl", ["a 1", "b 5"], ["a 2"], ["a 2"], None, ["x"], ["a 1"]),
        generated(tmp_path, "two.jsonl", ["c 3"], ["b 9"], ["a 2 "], ["c 3"], ["c 1"], ["", "b 1"]),
    )
    found, items = made(data, files)
    assert [item.record.responses for item in items] == [("b 5", "a 1", "c 3"), ("b 9", "a 2")]
    assert items[0].fields == {
        "origin": "coco",
        "chosen_score": 5.0,
        "rejected_score": 1.0,
        "scores": [5.0, 1.0, 3.0],
        "chosen_model": "one",
        "rejected_model": "one",
        "models": ["one", "one", "two"],
    }
    assert found["left_out"] == {"with one response": 2, "failed": 1, "tie": 1}
    assert found["scores"] == {"best": 7.0, "worst": 1.5, "all": 4.0}
    assert (found["chosen"], found["rejected"]) == ({"one": 1, "two": 1}, {"one": 2})
    lines = told(found).splitlines()
    assert lines[0] == "2 pairs of 6 records (left out: 2 with one response, 1 failed, 1 tie)"
    assert lines[1:] == ["mean score: best 7, worst 1.5, all 4", "chosen: 1 one, 1 two", "rejected: 2 one"]
    assert len(records_from(tmp_path / "pairs.jsonl")) == 2


def test_a_margin(tmp_path):
    data = prompts(tmp_path, 2)
    files = [generated(tmp_path, "one.jsonl", ["a 1", "b 5"], ["a 1", "b 2"])]
    found, items = made(data, files, margin=2.0)
    assert [item.record.id for item in items] == ["r0"] and found["left_out"] == {"below the margin": 1}
    assert_refusal(
        lambda: made(data, files, margin=9.0), "no pair is left", "2 below the margin", "--margin"
    )


def test_the_responses_that_records_have(tmp_path):
    rows = [trl(images=[], chosen="a 1", rejected="b 2", responses=["c 7"], chosen_model="x", bdhs={})]
    found, (item,) = made(written(tmp_path, *rows))
    assert item.record.responses == ("c 7", "a 1", "b 2") and found["chosen"] == {}
    assert item.fields == {"chosen_score": 7.0, "rejected_score": 1.0, "scores": [7.0, 1.0, 2.0]}


def test_scores_are_kept(tmp_path, asked, monkeypatch):
    monkeypatch.setattr("mllm_align.curation.pair.TOGETHER", 2)
    data = prompts(tmp_path, 5)
    files = [generated(tmp_path, "one.jsonl", *([f"a {i}", f"b {i + 1}"] for i in range(5)))]
    with pytest.raises(KeyboardInterrupt, match="4 of 5 records are done"):
        made(data, files, JudgeConfig(Digits(breaks=3)))
    assert not (tmp_path / "pairs.jsonl").exists()
    assert_refusal(lambda: made(data, files), "was begun with another config.breaks")
    assert_refusal(
        lambda: made(data, files, JudgeConfig(Digits(breaks=3)), model="other"), "begun with another model"
    )
    asked.clear()
    found, items = made(data, files, JudgeConfig(Digits(breaks=3)))
    assert asked == [1] and (found["pairs"], len(items)) == (5, 5)
    assert not (tmp_path / "pairs.jsonl.part").exists()


def test_what_is_refused(tmp_path):
    data, good = prompts(tmp_path, 2), {"id": "r0", "responses": ["a 1", "b 2"]}

    def refused(*words, lines=None, files=None, **options):
        files = [written(tmp_path, *lines, name="g.jsonl")] if lines else files
        assert_refusal(lambda: made(data, files or (), **options), *words)
        assert not (tmp_path / "pairs.jsonl").exists()

    refused("has 1 lines for 2 records", lines=[good])
    refused("has 'r0' where the data have 'r1'", lines=[good, good])
    refused(
        "g.jsonl line 2", "no id with a list of responses", lines=[good, {"index": 1, "responses": ["x"]}]
    )
    refused("can't be read", files=[tmp_path / "absent.jsonl"])
    refused(
        "no record of",
        "two different responses",
        lines=[{"id": f"r{i}", "responses": ["a"]} for i in (0, 1)],
    )
    refused("--margin is -1", lines=[good, good | {"id": "r1"}], margin=-1.0)
    refused("the response", "is missing", config=JudgeConfig(Digits(), DataConfig()))
    assert json.loads(data.read_text().splitlines()[0])["id"] == "r0"
