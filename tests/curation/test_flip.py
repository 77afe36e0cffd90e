"""Pairs whose preference flips."""

import pytest
from published import png
from refusals import assert_refusal
from test_items import read, written

from mllm_align.curation.flip import flip, told
from mllm_align.data.preferences import conversation

ANSWERS = {"Be brief.": "A cup.", "Say all.": "A cup and a dog.", "Colours.": "The cup is red."}


def rows(prompt="What?", image="a.png", answers=ANSWERS):
    about = {"images": [image], "prompt": prompt}
    return [about | {"preferences": {"user": p}, "completion": text} for p, text in answers.items()]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def test_what_is_chosen_under_one_preference_is_rejected_under_another(folder):
    file = written(
        folder, *rows(), *rows(image="b.png"), *rows(prompt="Where?", answers={"Brief.": "Here."})
    )
    out = folder / "pairs.jsonl"
    found = flip([file], out)
    assert found == {"records": 7, "groups": 3, "without_preferences": 0, "without_other": 1, "pairs": 6}
    assert told(found) == "6 pairs of 7 records in 3 groups (left out: 1 without another answer)"
    pairs = read(out)
    for item in pairs:
        ((tier, preference),) = item.record.preferences
        assert tier == "user" and item.chosen == ANSWERS[preference] != item.rejected
        assert ANSWERS[item.fields["rejected_preferences"]["user"]] == item.rejected
        assert conversation(item.record)[-1].text == f"{preference}\nWhat?"
    assert flip([file], folder / "again.jsonl") == found
    assert out.read_text() == (folder / "again.jsonl").read_text()
    flip([file], folder / "other.jsonl", seed=1)
    assert out.read_text() != (folder / "other.jsonl").read_text()


def test_records_that_tell_nothing_are_left_out(folder):
    same = rows(answers={"Be brief.": "A cup.", "Be short.": "A cup. "})
    plain = [{"images": ["b.png"], "prompt": "What?", "completion": "A dog."}]
    found = flip([written(folder, *same, *plain, *rows(image="b.png"))], folder / "pairs.jsonl")
    assert found["without_preferences"] == 1 and found["without_other"] == 2 and found["pairs"] == 3


def test_parquet_keeps_preferences(folder):
    flip([written(folder, *rows())], folder / "pairs.parquet")
    pairs = read(folder / "pairs.parquet")
    assert sorted(dict(item.record.preferences)["user"] for item in pairs) == sorted(ANSWERS)
    found = flip([folder / "pairs.parquet"], folder / "again.parquet")
    assert found["pairs"] == 3, "the same images by their bytes"


def test_refusals(folder):
    file = written(folder, {"images": ["a.png"], "prompt": "What?", "completion": "A cup."})
    assert_refusal(lambda: flip([file], folder / "p.jsonl"), "different preferences", "give several")
    assert_refusal(lambda: flip([file], folder / "p.txt"), "is no .parquet or .jsonl name")
    assert not (folder / "p.jsonl").exists()
