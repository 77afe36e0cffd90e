"""Records with what else their rows say."""

import json
from collections import Counter

from published import completion, rlhfv, trl, vlfeedback
from refusals import assert_refusal

from mllm_align.config import DataConfig
from mllm_align.curation.items import read_items
from mllm_align.data.mixture import set_names


def written(folder, *rows, name="set.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file, **options):
    return list(read_items(file, "set", DataConfig(**options)))


def test_a_row_keeps_what_its_record_does_not_say(tmp_path):
    bdhs = {"iterations": 2}
    (item,) = read(written(tmp_path, trl(bdhs=bdhs, origin="coco", id="x", responses=["A cow."])))
    assert item.fields == {"bdhs": bdhs, "origin": "coco"} and item.source == "set"
    assert (item.prompt, item.chosen, item.rejected) == ("What?", "A cat.", "A dog.")
    row = rlhfv(image=None)
    (item,) = read(written(tmp_path, row))
    assert item.fields == {name: row[name] for name in ("ds_name", "origin_dataset", "origin_split")}


def test_a_mixed_file_says_where_a_record_is_from(tmp_path):
    file = written(tmp_path, trl(source="povid.json", id="x"), trl(source=3, id="y"))
    assert [(item.source, item.fields) for item in read(file)] == [("povid.json", {}), ("set", {})]


def test_rated_responses_say_who_wrote_them_and_why(tmp_path):
    rows = [
        vlfeedback(completion("A cat.", 5, 4, 4, model="gpt4v"), completion("A dog.", 2, model="fuyu-8b"))
    ]
    (item,) = read(written(tmp_path, *rows))
    assert {name: item.fields[name] for name in ("chosen_model", "rejected_model")} == {
        "chosen_model": "gpt4v",
        "rejected_model": "fuyu-8b",
    }
    assert (item.fields["chosen_rating"], item.fields["rejected_rating"]) == (4.333, 2.0)
    assert item.fields["chosen_reason"].splitlines()[0] == "Helpfulness 5: as it is"


def test_images_are_no_fields(tmp_path):
    picture = {"bytes": "iVBORw0KGgo=", "path": None}
    (item,) = read(written(tmp_path, trl(image=None, images=["a.png"], other=[picture])))
    assert item.fields == {"other": [picture]}, "text that a JSON file has is no bytes"


def test_one_response_is_enough_and_omissions_are_counted(tmp_path):
    file, dropped = (
        written(tmp_path, vlfeedback(completion("A.", 3), completion("B.", 3)), vlfeedback()),
        Counter(),
    )
    assert len(list(read_items(file, "set", DataConfig(), dropped))) == 1 and dropped["tie"] == 1
    (item,) = read(written(tmp_path, {"prompt": "What?", "completion": "A cat."}))
    assert item.rejected is None


def test_what_is_refused(tmp_path):
    assert_refusal(lambda: read(written(tmp_path)), "holds no records")
    assert_refusal(lambda: set_names([tmp_path / "a.jsonl"] * 2), "given twice")
    assert list(set_names([tmp_path / "a/x.json", tmp_path / "b/x.json"])) == ["a-x.json", "b-x.json"]
