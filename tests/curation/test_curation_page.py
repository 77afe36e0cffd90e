"""The page of a data set: what its script is given."""

import json
import re

import pytest
from published import completion, png, trl, vlfeedback
from refusals import assert_refusal
from test_items import written

from mllm_align.curation.page import write_page

BDHS = {
    "iterations": 2,
    "guided": True,
    "similarities": [0.97, 0.5],
    "distortion": "masked",
    "mask_share": 0.9871,
    "sentences": [{"sentence": [0, 16], "cut": 6, "written": "black dog.", "swapped": None}],
}


def content(file):
    (found,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', file.read_text())
    return json.loads(found)


@pytest.fixture
def shown(tmp_path):
    """What the page of some rows has inside."""
    (tmp_path / "a.png").write_bytes(png())

    def shown(*rows, **options):
        write_page([written(tmp_path, *rows)], tmp_path / "page.html", **options)
        return content(tmp_path / "page.html")

    return shown


def test_pairs(shown):
    history = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "What?"},
    ]
    found = shown(
        trl(id="1", chosen="A red cat.", rejected="A dog.", source="mine", score=0.5),
        trl(id="2", prompt=history, responses=["A third."], images=["a.png", "gone.png"][:1]),
        {"prompt": "Alone?", "completion": "Yes."},
    )
    first, second, third = found["records"]
    assert len(found["pictures"]) == 1 and first["pictures"] == second["pictures"] == [0]
    assert (first["id"], first["source"], first["difference"], first["likeness"]) == ("1", "mine", 1, 0.4)
    assert first["answers"] == [
        ["chosen", [["A ", 0], ["red cat", 1], [".", 0]]],
        ["rejected", [["A ", 0], ["dog", 1], [".", 0]]],
    ]
    assert first["facts"] == [["score", "0.5"]]
    assert second["history"] == [["asked", "Hello."], ["answered", "Hi."]] and second["prompt"] == "What?"
    assert second["answers"][2] == ["response 3", [["A third.", 0]]]
    assert (third["difference"], third["likeness"], len(third["answers"])) == (None, None, 1)


def test_what_bdhs_did(shown):
    row = trl(chosen="A big red cat.", rejected="A big black dog.", bdhs=BDHS)
    (record,) = shown(row)["records"]
    assert record["answers"] == [
        ["chosen", [["A big ", 0], ["", 4], ["red cat", 1], [".", 0]]],
        ["rejected", [["A big ", 0], ["black dog", 3], [".", 2]]],
    ]
    told = "2 tries, likeness 0.97, 0.50; guided; 98.7% of the image hidden (masked)"
    assert record["facts"] == [["BDHS", told]]
    assert shown(trl(bdhs=json.dumps(BDHS)))["records"][0]["facts"] == [["BDHS", told]], "as Parquet has it"
    assert shown(trl(bdhs={"sentences": [3, {}], "similarities": "x"}))["records"][0]["facts"]


def test_what_a_writer_was_asked_to_change(shown):
    how = {"kind": "counts", "tries": 2, "writer": "qwen"}
    first, second = shown(trl(corruption=how), trl(corruption=json.dumps(how | {"tries": 1})))["records"]
    assert first["facts"] == [["asked to change", "counts; 2 tries, by qwen"]]
    assert second["facts"] == [["asked to change", "counts; 1 try, by qwen"]], "as Parquet holds it"


def test_who_wrote_a_response_and_why_it_was_chosen(shown):
    both = completion("A cat.", 5, model="gpt4v"), completion("A dog.", 2, model="fuyu-8b")
    facts = dict(shown(vlfeedback(*both))["records"][0]["facts"])
    assert facts["chosen reason"].startswith("Helpfulness 5: as it is")
    assert list(facts)[:2] == ["chosen reason", "rejected reason"], "reasons first"
    assert (facts["chosen model"], facts["rejected rating"]) == ("gpt4v", "2.0")


def test_of_many_some_are_drawn_and_always_the_same(shown):
    rows = [trl(id=str(i)) for i in range(30)]
    ids = [record["id"] for record in shown(*rows, limit=5)["records"]]
    assert len(ids) == 5 and ids == sorted(ids, key=int) and ids != ["0", "1", "2", "3", "4"]
    assert ids == [record["id"] for record in shown(*rows, limit=5)["records"]]


def test_hostile_texts_stay_texts(shown, tmp_path):
    text = "</script><script>alert(1)</script><!--"
    (record,) = shown(trl(chosen=text, origin=text))["records"]
    assert "".join(part for part, _ in record["answers"][0][1]) == text
    assert (tmp_path / "page.html").read_text().count("<script") == 2


def test_pictures_that_cannot_be_read_are_left_out(shown):
    assert [each["pictures"] for each in shown(trl(images=["gone.png"]), trl(id="2"))["records"]] == [
        [None],
        [0],
    ]


def test_what_is_refused(tmp_path):
    file = written(tmp_path, trl())
    assert_refusal(lambda: write_page([file], tmp_path), "is a folder")
    assert_refusal(lambda: write_page([file], tmp_path / "p.html", limit=0), "--limit is 0")
    assert_refusal(lambda: write_page([tmp_path / "no.jsonl"], tmp_path / "p.html"), "no such file")
    assert not (tmp_path / "p.html").exists()
